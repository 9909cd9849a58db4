//! A host whose time and input follow a seed, and nothing of the machine.

use machine::environment::{
    Arrival, Bound, Boundary, Channel, Directive, Environment, EnvironmentError, SyncOrdinal,
};
use x86::{Exit, Instructions, Nanos, Position, VcpuId};

/// See the module.
pub struct Capricious {
    pub seed: u64,
    pub now: u64,
    /// Stops the machine at the first boundary after this time.
    pub stop_at: u64,
    /// On an engine that counts: interrupts it by position, since nobody kicks it.
    pub slices: bool,
    /// Input comes at one boundary in so many.
    pub input_every: u64,
    pub output: Vec<u8>,
}

impl Capricious {
    pub fn new(seed: u64) -> Self {
        let stop_at = u64::MAX;
        Self {
            seed: seed | 1,
            now: 0,
            stop_at,
            slices: false,
            input_every: 16,
            output: Vec::new(),
        }
    }

    fn random(&mut self) -> u64 {
        self.seed ^= self.seed << 13;
        self.seed ^= self.seed >> 7;
        self.seed ^= self.seed << 17;
        self.seed
    }

    fn pass(&mut self, most: u64) -> Nanos {
        self.now += self.random() % most;
        Nanos::new(self.now)
    }
}

impl Environment for Capricious {
    fn now(&mut self) -> Result<Nanos, EnvironmentError> {
        Ok(self.pass(20_000))
    }

    fn entropy(&mut self, out: &mut [u8]) -> Result<(), EnvironmentError> {
        for byte in out {
            *byte = self.random() as u8;
        }
        Ok(())
    }

    fn output(&mut self, _: Channel, bytes: &[u8]) -> Result<(), EnvironmentError> {
        self.output.extend_from_slice(bytes);
        Ok(())
    }

    fn exited(
        &mut self,
        _: VcpuId,
        _: &Exit,
        _: SyncOrdinal,
        _: Option<Position>,
    ) -> Result<(), EnvironmentError> {
        Ok(())
    }

    fn boundary(&mut self, at: Boundary<'_>) -> Result<Directive, EnvironmentError> {
        let mut now = self.pass(60_000);
        let mut arrivals = Vec::new();
        if at.halted
            && let Some(deadline) = at.deadline
        {
            now = now.max(deadline);
            self.now = now.get();
        }
        if self.now >= self.stop_at {
            return Ok(Directive {
                arrivals: vec![Arrival::Stop],
                bound: Bound::Exit,
            });
        }
        if at.deadline.is_some_and(|deadline| deadline <= now) {
            arrivals.push(Arrival::Time { now });
        }
        if self.random().is_multiple_of(self.input_every) && at.input_room > 8 {
            let bytes = vec![self.random() as u8; (self.random() % 3 + 1) as usize];
            arrivals.push(Arrival::Input {
                channel: Channel::Com1,
                bytes,
            });
        }
        let bound = match at.engine.position() {
            Some(position) if self.slices => {
                let retired = Instructions::new(position.retired.get() + self.random() % 700 + 1);
                Bound::Position(Position {
                    retired,
                    within: self.random() % 3,
                })
            }
            _ => Bound::Exit,
        };
        Ok(Directive { arrivals, bound })
    }
}
