//! The tensors that a run moves, with what the optimizer keeps for each.

use super::TrainConfig;
use super::beside::Companion;
use super::optimizer::Moments;
use crate::adapter::{Adapters, Gradients, Group, Method, Settings, TensorId, TensorPart, TensorSpec, layer_of};
use crate::base::Base;
use crate::error::Result;
use pocketlora_kernels::{Backend, Call};

/// A tensor in training.
pub(super) struct Trained<B: Backend> {
    pub spec: TensorSpec,
    pub group: Group,
    /// Whose it is: 0 for the first adapter, or the place of one beside it, from 1.
    pub owner: usize,
    /// Where its values are.
    pub id: TensorId,
    /// The model's layer that it is in, if it is in one.
    pub layer: Option<usize>,
    /// Of its first rows, the values that they keep.
    pub fixed: Option<B::Buffer>,
    pub moments: Moments<B>,
}

impl<B: Backend> Trained<B> {
    /// Makes the fixed rows of `x`, its gradient or its values, zero; or, of its values, what they are to stay.
    ///
    /// # Errors
    /// Out of memory.
    pub fn hold(&self, backend: &B, x: &mut B::Buffer, keep: bool) -> Result<()> {
        let Some(fixed) = &self.fixed else { return Ok(()) };
        let count = (backend.len(fixed) / self.spec.shape[1]) as u32;
        let rows: Vec<u32> = (0..count).collect();
        let mut old = backend.buffer(backend.len(fixed))?;
        // By their negatives, which leaves exactly nothing.
        backend.run(Call::GatherRows { x, rows: &rows, y: &mut old })?;
        backend.run(Call::Scale { factor: -1.0, x: &mut old })?;
        backend.run(Call::ScatterAddRows { x: &old, rows: &rows, y: x })?;
        if keep {
            backend.run(Call::ScatterAddRows { x: fixed, rows: &rows, y: x })?;
        }
        Ok(())
    }
}

/// Moments and gradients for every tensor of the attached adapters.
pub(super) fn trained_tensors<B: Backend>(
    base: &Base<B>,
    adapters: &Adapters<B>,
    method: &Method,
    settings: &Settings,
    beside: &[Companion],
    config: &TrainConfig,
) -> Result<(Vec<Trained<B>>, Gradients<B>)> {
    let backend = &base.backend;
    let mut tensors = Vec::new();
    for (id, spec) in adapters.held().specs() {
        let other = beside.iter().position(|other| other.owns(&spec.name));
        let (method, settings, rate) = match other.map(|i| &beside[i]) {
            Some(other) => (&other.method, &other.settings, other.rate),
            None => (method, settings, 1.0),
        };
        let group = method.group(&spec.name, settings);
        let group = Group { rate: rate * group.rate, ..group };
        let moments = Moments::new(backend, config, spec.values())?;
        let shared = method.kind().shared().contains(&spec.name.as_str());
        let rows = if shared { method.fixed_rows() } else { 0 };
        let fixed = (rows > 0).then(|| -> Result<B::Buffer> {
            let values = adapters.held().read(backend, id)?;
            let len = rows * spec.shape[1];
            let mut fixed = backend.buffer(len)?;
            backend.write(&mut fixed, &values[..len]);
            Ok(fixed)
        });
        let layer = layer_of(&spec.name);
        let (spec, owner) = (spec.clone(), other.map_or(0, |i| i + 1));
        tensors.push(Trained { spec, group, owner, id, layer, moments, fixed: fixed.transpose()? });
    }
    Ok((tensors, gradients(base, adapters)?))
}

/// A gradient for every tensor of the attached adapters that has one.
pub(super) fn gradients<B: Backend>(base: &Base<B>, adapters: &Adapters<B>) -> Result<Gradients<B>> {
    let one = |(part, values)| Ok((part != TensorPart::Fixed).then(|| base.backend.buffer(values)).transpose()?);
    Ok(Gradients { resting: Vec::new(), tensors: adapters.held().parts().map(one).collect::<Result<_>>()? })
}
