//! The stores an instruction is about to make.
//!
//! Purpose: hold checked stores back until nothing of the instruction can fail any more.
//! Invariants: bounded; later stores win where they overlap; no allocation.

/// The largest instruction is FXSAVE with 32 stores of 16 bytes, or ENTER with 32 of 8.
const CAPACITY: usize = 72;

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Stores {
    addr: [u64; CAPACITY],
    size: [u8; CAPACITY],
    data: [[u8; 16]; CAPACITY],
    len: usize,
}

impl Default for Stores {
    fn default() -> Self {
        Self {
            addr: [0; CAPACITY],
            size: [0; CAPACITY],
            data: [[0; 16]; CAPACITY],
            len: 0,
        }
    }
}

impl Stores {
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    #[inline]
    pub(crate) fn clear(&mut self) {
        self.len = 0;
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The store with this number.
    pub(crate) fn get(&self, n: usize) -> (u64, [u8; 16], usize) {
        (self.addr[n], self.data[n], usize::from(self.size[n]))
    }

    /// Adds a store of at most sixteen bytes; false when there is no room.
    #[must_use]
    pub(crate) fn push(&mut self, addr: u64, data: &[u8]) -> bool {
        let n = self.len;
        if n == CAPACITY || data.len() > 16 {
            return false;
        }
        self.addr[n] = addr;
        self.size[n] = data.len() as u8;
        self.data[n][..data.len()].copy_from_slice(data);
        self.len += 1;
        true
    }

    /// Lays the stores over bytes loaded from `addr`.
    pub(crate) fn overlay(&self, addr: u64, bytes: &mut [u8]) {
        for n in 0..self.len {
            let (at, data, size) = self.get(n);
            for (i, byte) in data[..size].iter().enumerate() {
                let offset = at.wrapping_add(i as u64).wrapping_sub(addr);
                if let Some(out) = bytes.get_mut(usize::try_from(offset).unwrap_or(usize::MAX)) {
                    *out = *byte;
                }
            }
        }
    }
}
