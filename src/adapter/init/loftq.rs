//! What rounding took from a layer: `W - nf4(W)`, of the weight in a finer source and of the base's own.

use super::Operator;
use super::activations::matrix;
use crate::adapter::weight::Weight;
use crate::error::{Error, Result};
use crate::format::Source;
use pocketlora_kernels::{Arithmetic, Backend, Call};

/// `W - nf4(W)` of one layer, of which the first is on the device in f32.
pub(super) struct Rounded<'a, B: Backend> {
    weight: &'a Weight<'a, B>,
    whole: B::Matrix,
}

/// The number of the tensor of `source` that is the layer of `weight`.
///
/// # Errors
/// It is not there, has another shape, or is in 4 bits there as well.
pub(super) fn place<B: Backend>(weight: &Weight<'_, B>, source: &dyn Source) -> Result<usize> {
    let (name, [out, input]) = (&weight.base.model.params()[weight.layer.0 as usize].name, Operator::shape(weight));
    let found = source.tensors().iter().position(|tensor| tensor.name == *name);
    let refused = |got: String| {
        let expected = format!("a model with `{name}` of shape `[{out}, {input}]` in 8 bits or more");
        Error::config("loftq-source", expected, got)
    };
    let at = found.ok_or_else(|| refused("one without it".to_owned()))?;
    let meta = &source.tensors()[at];
    if meta.shape != [out, input] || meta.is_four_bit() {
        return Err(refused(format!("{} of shape {:?}", meta.dtype, meta.shape)));
    }
    Ok(at)
}

impl<'a, B: Backend> Rounded<'a, B> {
    /// Reads the layer of `weight` from `source`.
    ///
    /// # Errors
    /// Those of [`place`]; out of memory.
    pub fn read(weight: &'a Weight<'a, B>, source: &dyn Source) -> Result<Self> {
        let (at, [out, input]) = (place(weight, source)?, Operator::shape(weight));
        let mut values = vec![0.0; out * input];
        source.read_rows(at, 0..out, &mut values)?;
        Ok(Self { weight, whole: matrix(&weight.base.backend, &values, input)? })
    }

    /// What `call` makes of `x` with the whole weight, minus `rounded`, what the base's makes of it.
    fn without(
        &self,
        x: &[f32],
        mut rounded: Vec<f32>,
        call: impl FnOnce(&B, &B::Buffer, &mut B::Buffer) -> Result<()>,
    ) -> Result<Vec<f32>> {
        let backend = &self.weight.base.backend;
        let (mut read, mut given) = (backend.buffer(x.len())?, backend.buffer(rounded.len())?);
        backend.write(&mut read, x);
        call(backend, &read, &mut given)?;
        let mut whole = vec![0.0; rounded.len()];
        backend.read(&given, &mut whole)?;
        rounded.iter_mut().zip(whole).for_each(|(rounded, whole)| *rounded = whole - *rounded);
        Ok(rounded)
    }
}

impl<B: Backend> Operator for Rounded<'_, B> {
    fn shape(&self) -> [usize; 2] {
        Operator::shape(self.weight)
    }

    fn times(&self, x: &[f32]) -> Result<Vec<f32>> {
        let (w, arithmetic) = (&self.whole, Arithmetic::Exact);
        self.without(x, Operator::times(self.weight, x)?, |backend, x, y| {
            Ok(backend.run(Call::Matmul { arithmetic, w, x, y, accumulate: false })?)
        })
    }

    fn back(&self, y: &[f32]) -> Result<Vec<f32>> {
        let (w, arithmetic) = (&self.whole, Arithmetic::Exact);
        self.without(y, Operator::back(self.weight, y)?, |backend, y, dx| {
            Ok(backend.run(Call::MatmulVjpX { arithmetic, terms: &[(w, y)], dx, accumulate: false })?)
        })
    }
}
