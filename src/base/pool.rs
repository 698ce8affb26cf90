//! Memory of activations: buffers cut from regions that are allocated once.

use crate::error::Result;
use pocketlora_kernels::Backend;

/// Buffers between uses. What a taken buffer holds is unspecified.
pub struct Pool<B: Backend> {
    passing: Region<B>,
    kept: Region<B>,
}

impl<B: Backend> Default for Pool<B> {
    fn default() -> Self {
        Self { passing: Region::default(), kept: Region::default() }
    }
}

impl<B: Backend> Pool<B> {
    /// Allocates what is to be cut: `passing` and `kept` floats.
    ///
    /// # Errors
    /// Out of memory.
    pub fn reserve(&mut self, backend: &B, passing: usize, kept: usize) -> Result<()> {
        for (region, len) in [(&mut self.passing, passing), (&mut self.kept, kept)] {
            if len > 0 {
                region.free.push(backend.region(len)?);
            }
        }
        Ok(())
    }

    /// A buffer of `len` values, used before or new.
    ///
    /// # Errors
    /// Out of memory.
    pub fn take(&mut self, backend: &B, len: usize) -> Result<B::Buffer> {
        self.passing.take(backend, len)
    }

    /// Hands a buffer back for later use.
    pub fn put(&mut self, backend: &B, buffer: B::Buffer) {
        self.passing.put(backend, buffer);
    }

    /// Memory for what outlives many operations: by itself, so that it leaves no holes between what passes.
    pub fn kept(&mut self) -> &mut Region<B> {
        &mut self.kept
    }

    /// Frees everything held; called when lengths change and nothing was reserved, so that a run does not hold buffers
    /// of every length it met.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

/// Memory cut into buffers of any length, first fit: the same calls take the same places, however large the region is.
pub struct Region<B: Backend> {
    /// By address; neighbours are joined.
    free: Vec<B::Buffer>,
}

impl<B: Backend> Default for Region<B> {
    fn default() -> Self {
        Self { free: Vec::new() }
    }
}

impl<B: Backend> Region<B> {
    /// See [`Pool::take`].
    ///
    /// # Errors
    /// Out of memory.
    pub fn take(&mut self, backend: &B, len: usize) -> Result<B::Buffer> {
        for i in 0..self.free.len() {
            if backend.capacity(&self.free[i]) < len {
                continue;
            }
            match backend.cut(self.free.remove(i), len) {
                Ok((buffer, rest)) => {
                    if let Some(rest) = rest {
                        self.free.insert(i, rest);
                    }
                    return Ok(buffer);
                }
                Err(buffer) => self.free.insert(i, buffer),
            }
        }
        // No region holds it: a further one of its own.
        Ok(backend.region(len)?)
    }

    /// See [`Pool::put`].
    pub fn put(&mut self, backend: &B, buffer: B::Buffer) {
        let mut at = self.free.partition_point(|free| backend.address(free) < backend.address(&buffer));
        let mut buffer = buffer;
        if at > 0 {
            match backend.join(self.free.remove(at - 1), buffer) {
                Ok(joined) => {
                    buffer = joined;
                    at -= 1;
                }
                Err((before, alone)) => {
                    self.free.insert(at - 1, before);
                    buffer = alone;
                }
            }
        }
        if at < self.free.len() {
            match backend.join(buffer, self.free.remove(at)) {
                Ok(joined) => buffer = joined,
                Err((alone, after)) => {
                    self.free.insert(at, after);
                    buffer = alone;
                }
            }
        }
        self.free.insert(at, buffer);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pocketlora_kernels::cpu::Table;
    use pocketlora_kernels::{Counted, Cpu, Memory};

    #[test]
    fn what_is_counted_fits_what_is_reserved() {
        let (counted, cpu) = (Counted::new(Table::best(), 1), Cpu::new(1));
        let (mut plan, mut pool) = (Pool::<Counted>::default(), Pool::<Cpu>::default());
        plan.reserve(&counted, 1, 0).unwrap();
        let script = |apply: &mut dyn FnMut(usize, Option<usize>)| {
            // Takes number 0, 1, .. of some lengths, with gives between them.
            for (i, len) in [100, 7, 640, 33, 640, 100, 1, 2000, 50, 640].into_iter().enumerate() {
                apply(i, Some(len));
                if i % 3 == 2 {
                    apply(i - 1, None);
                }
            }
            [0, 2, 3, 5, 6, 8, 9].into_iter().for_each(|i| apply(i, None));
        };
        let mut spans = std::collections::BTreeMap::new();
        script(&mut |i, len| match len {
            Some(len) => drop(spans.insert(i, plan.take(&counted, len).unwrap())),
            None => plan.put(&counted, spans.remove(&i).unwrap()),
        });
        let floats = counted.count().regions[0] / 4;
        pool.reserve(&cpu, floats, 0).unwrap();
        let start = cpu.address(&pool.passing.free[0]);
        let mut buffers = std::collections::BTreeMap::new();
        script(&mut |i, len| match len {
            Some(len) => {
                let mut buffer = pool.take(&cpu, len).unwrap();
                assert_eq!((buffer.len(), cpu.address(&buffer) % 64), (len, 0));
                assert!((start..start + 4 * floats).contains(&cpu.address(&buffer)));
                buffer.fill(i as f32);
                assert!(buffers.values().all(|b: &pocketlora_kernels::cpu::Buffer| !b.contains(&(i as f32))));
                buffers.insert(i, buffer);
            }
            None => {
                let buffer = buffers.remove(&i).unwrap();
                assert!(buffer.iter().all(|x| *x == i as f32), "nobody else wrote to it");
                pool.put(&cpu, buffer);
            }
        });
        // Number 7, 4 and 1 went back early; all is one piece again.
        assert_eq!((pool.passing.free.len(), cpu.capacity(&pool.passing.free[0])), (1, floats));
    }
}
