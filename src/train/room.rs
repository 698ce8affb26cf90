//! Room on the disk for a run's result, held from its beginning: no checkpoint can take what the adapter needs.

use super::Trainer;
use super::trained::Trained;
use crate::adapter::{AdapterFile, Stored};
use crate::error::{Error, Result};
use crate::format::Staged;
use pocketlora_kernels::Backend;
use std::io::Write as _;

/// Zeros are written in pieces of this size.
const PIECE: usize = 1 << 20;
/// What a tensor takes in the file's header beside its name, at least.
const HEADER: u64 = 64;

/// A file of zeros beside where the adapter will be; it vanishes when it is dropped, or with the next run after a kill.
pub(super) struct Room {
    _file: Staged,
}

impl<B: Backend> Trainer<B> {
    /// Holds room for the adapter.
    ///
    /// # Errors
    /// There is none: better known before the first step than after the last.
    pub(super) fn hold_room(&self) -> Result<Room> {
        let path = AdapterFile::weights_in(&self.out);
        let file = Staged::write(&path, |file| {
            let zeros = vec![0; PIECE];
            let mut left = self.adapter_bytes();
            while left > 0 {
                let piece = left.min(PIECE as u64);
                file.write_all(&zeros[..piece as usize]).map_err(|e| Error::io("write", &path, e))?;
                left -= piece;
            }
            Ok(())
        })?;
        Ok(Room { _file: file })
    }

    /// Size of the adapter's file, rather less than more.
    fn adapter_bytes(&self) -> u64 {
        let file = &self.file;
        let all = std::iter::once(file).chain(&file.beside).map(|file| match file.method.kind().stored() {
            Stored::F16 => 2,
            Stored::F32 => 4,
        });
        let sizes: Vec<u64> = all.collect();
        let size = sizes[0];
        let of = |t: &Trained<B>| sizes[t.owner] * t.spec.values() as u64 + t.spec.name.len() as u64 + HEADER;
        // What is not trained is written as well, or becomes a part of what is.
        let fixed = self.file.tensors.iter().map(|(name, t)| size * t.data.len() as u64 + name.len() as u64 + HEADER);
        let kept = self.file.replaced.whole.iter().map(|whole| whole.tensor.bytes.len() as u64);
        let aside = self.cycles.as_ref().map(|cycles| size * cycles.values(&self.adapters) as u64);
        self.tensors.iter().map(of).chain(fixed).chain(kept).chain(aside).sum()
    }
}
