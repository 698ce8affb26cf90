//! From the tensors in training to files and back: checkpoints and the adapter.

use super::Trainer;
use super::checkpoint::{self, TensorState};
use super::setup::Trained;
use crate::adapter::{AdapterFile, HostTensor, LoraModule};
use crate::error::{Error, Result};
use pocketlora_kernels::Backend;
use std::sync::Arc;

impl<B: Backend> Trainer<B> {
    /// Goes to where the checkpoint in the output folder stands.
    ///
    /// # Errors
    /// There is none, it is broken, or it belongs to another run.
    pub fn resume(&mut self) -> Result<()> {
        let layout: Vec<(String, [usize; 2])> = self.tensors.iter().map(|t| (t.name.clone(), t.shape)).collect();
        let (step, states) = checkpoint::load(&self.out, &self.facts, &layout)?;
        for (t, state) in self.tensors.iter_mut().zip(&states) {
            for (buffer, values) in [&mut t.m, &mut t.v].into_iter().zip(&state.values[1..]) {
                self.base.backend.write(buffer, values);
            }
        }
        self.facts.step = step;
        let base = Arc::clone(&self.base);
        let mut states = states.iter();
        self.each_master(|_, _, master| {
            let state = states.next().expect("one for each tensor, as `load` checked");
            base.backend.write(master, &state.values[0]);
        });
        Ok(())
    }

    fn master(&self, t: &Trained<B>) -> Result<Vec<f32>> {
        let (param, part) = t.place;
        let mut host = vec![0.0; t.shape[0] * t.shape[1]];
        self.adapters.on(param)[0].read(&self.base.backend, part, &mut host)?;
        Ok(host)
    }

    fn host(&self, buffer: &B::Buffer) -> Result<Vec<f32>> {
        let mut host = vec![0.0; self.base.backend.len(buffer)];
        self.base.backend.read(buffer, &mut host)?;
        Ok(host)
    }

    /// Writes the state of the run beside where the adapter will be.
    ///
    /// # Errors
    /// The file cannot be written; the one before it is kept then.
    pub fn save_checkpoint(&self) -> Result<()> {
        let state = |t: &Trained<B>| {
            let values = [self.master(t)?, self.host(&t.m)?, self.host(&t.v)?];
            Ok(TensorState { name: t.name.clone(), shape: t.shape, values })
        };
        let states: Vec<TensorState> = self.tensors.iter().map(state).collect::<Result<_>>()?;
        checkpoint::save(&self.out, &self.facts, &states)
    }

    /// Writes the adapter as it is now.
    ///
    /// # Errors
    /// A value does not fit f16, or the files cannot be written.
    pub fn save_adapter(&self) -> Result<()> {
        let mut modules = Vec::with_capacity(self.tensors.len() / 2);
        for pair in self.tensors.chunks_exact(2) {
            let tensor = |t: &Trained<B>| Ok::<_, Error>(HostTensor { shape: t.shape, data: self.master(t)? });
            let path = pair[0].name.trim_end_matches(".lora_A.weight").to_owned();
            modules.push(LoraModule::new(path, tensor(&pair[0])?, tensor(&pair[1])?, &self.lora));
        }
        AdapterFile { dir: self.out.clone(), config: self.lora.clone(), modules }.save()
    }
}
