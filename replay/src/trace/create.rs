//! Creating a trace file.
//!
//! Purpose: a new recording never destroys an old one silently, nor before the new one is under way.
//! Invariants: without `force` an existing file is refused, atomically. With it, machine and images are written to a new file beside the old one,
//! which then takes its place in one step; failing before that leaves the old file as it was. Devices and pipes are
//! written to as they are, never replaced.
//! Elsewhere: what is written (`writer`).

use super::records::{Image, MachineRecord};
use super::writer::{TraceWriter, WriteTraceError};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// Why a trace file was not begun.
#[derive(Debug, thiserror::Error)]
pub enum CreateTraceError {
    /// There is a file of that name.
    #[error("{} exists already; choose another name, or overwrite it with --force", path.display())]
    Exists {
        /// The file.
        path: PathBuf,
    },
    /// The host refused.
    #[error("cannot create the trace {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The first chunks could not be written.
    #[error(transparent)]
    Write(#[from] WriteTraceError),
}

/// A file beside the one to be replaced; removed again unless it took that one's place.
struct Beside {
    path: PathBuf,
    keep: bool,
}

impl Drop for Beside {
    fn drop(&mut self) {
        if !self.keep {
            // Nobody can be told, and an orphan does no harm.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl TraceWriter {
    /// Begins a trace in the file `path`; an existing regular file is overwritten only with `force`.
    pub fn create(
        path: &Path,
        force: bool,
        machine: &MachineRecord,
        images: &[Image],
    ) -> Result<Self, CreateTraceError> {
        let io_error = |source| CreateTraceError::Io {
            path: path.to_owned(),
            source,
        };
        let begin =
            |file: File| Self::new(Box::new(file), path.display().to_string(), machine, images);
        match fs::metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => create_new(path, begin),
            Err(e) => Err(io_error(e)),
            Ok(there) if !there.is_file() => {
                let file = OpenOptions::new()
                    .write(true)
                    .open(path)
                    .map_err(io_error)?;
                Ok(begin(file)?)
            }
            Ok(_) if !force => Err(CreateTraceError::Exists {
                path: path.to_owned(),
            }),
            Ok(_) => {
                // Through a symbolic link, the file it leads to is the one replaced.
                let target = fs::canonicalize(path).map_err(io_error)?;
                let (mut beside, file) = create_beside(&target).map_err(io_error)?;
                let writer = begin(file)?;
                fs::rename(&beside.path, &target).map_err(io_error)?;
                beside.keep = true;
                Ok(writer)
            }
        }
    }
}

/// A file that is not there yet; not there again either if the beginning fails.
fn create_new(
    path: &Path,
    begin: impl FnOnce(File) -> Result<TraceWriter, WriteTraceError>,
) -> Result<TraceWriter, CreateTraceError> {
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::AlreadyExists => CreateTraceError::Exists { path },
                _ => CreateTraceError::Io { path, source },
            }
        })?;
    let mut created = Beside {
        path: path.to_owned(),
        keep: false,
    };
    let writer = begin(file)?;
    created.keep = true;
    Ok(writer)
}

fn create_beside(target: &Path) -> io::Result<(Beside, File)> {
    let name = target.file_name().unwrap_or_default().to_string_lossy();
    let mut attempt = 0;
    loop {
        let beside = format!(".{name}.{}.{attempt}.partial", std::process::id());
        let path = target.with_file_name(beside);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => return Ok((Beside { path, keep: false }, file)),
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && attempt < 100 => attempt += 1,
            Err(e) => return Err(e),
        }
    }
}
