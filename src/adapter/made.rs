//! Tensors that are made of those in an adapter's file, for methods whose file does not hold what works on a layer. A [`Map`]
//! says how, on the host, and carries gradients back: the device works with the made ones, in training an optimizer moves
//! the file's. Once a step the made tensors' gradients are read, become gradients of the file's tensors, and after the
//! optimizer's step the made ones are made anew.

use super::attach::Adapters;
use super::form::Gradients;
use super::held::{Held, TensorId};
use super::weight::{LayerWeight, Weight};
use crate::base::Base;
use crate::error::Result;
use pocketlora_kernels::Backend;
use pocketlora_models::Param;

/// Made tensors of one module as a function of its parts in the file.
pub(super) trait Map: Send + Sync {
    /// The made tensors, of the parts `own` in the method's order and of the layer's `weight`.
    ///
    /// # Errors
    /// Out of memory.
    fn forward(&self, own: &[&[f32]], weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>>;

    /// Gradients of the parts, given those of the made tensors; an empty one where a part gets none this way.
    fn backward(&self, own: &[&[f32]], grads: &[&[f32]]) -> Vec<Vec<f32>>;

    /// Which part training puts to other values before it is used, and these: what keeps it within its bounds.
    fn settled(&self, _own: &[&[f32]]) -> Option<(usize, Vec<f32>)> {
        None
    }

    /// What training adds to the loss for the values of the parts themselves, times `weight`; adds its gradient to `grads`.
    fn penalty(&self, _own: &[&[f32]], _weight: f32, _grads: &mut [Vec<f32>]) -> f64 {
        0.0
    }
}

/// Where the values of a part are.
pub(super) enum Input {
    /// On the device, in training.
    Held(TensorId),
    /// Here: it stays as it is. Empty where memory is counted.
    Host(Vec<f32>),
}

/// How the made tensors of one module follow from its parts.
pub(super) struct Link {
    pub map: Box<dyn Map>,
    pub own: Vec<Input>,
    pub made: Vec<TensorId>,
    pub layer: Param,
}

impl Link {
    fn values<B: Backend>(&self, backend: &B, held: &Held<B>) -> Result<Vec<Vec<f32>>> {
        let one = |input: &Input| match input {
            Input::Held(id) => held.read(backend, *id),
            Input::Host(values) => Ok(values.clone()),
        };
        self.own.iter().map(one).collect()
    }
}

fn slices(values: &[Vec<f32>]) -> Vec<&[f32]> {
    values.iter().map(Vec::as_slice).collect()
}

impl<B: Backend> Adapters<B> {
    /// Makes made tensors anew, after the ones that they are made of were moved; these are put into their bounds first.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn renew(&mut self, base: &Base<B>) -> Result<()> {
        let backend = &base.backend;
        for i in 0..self.held().links().len() {
            let link = &self.held().links()[i];
            let mut own = link.values(backend, self.held())?;
            let settled = link.map.settled(&slices(&own)).map(|(part, values)| {
                own[part].clone_from(&values);
                (&link.own[part], values)
            });
            let settled = settled.and_then(|(input, values)| match input {
                Input::Held(id) => Some((*id, values)),
                Input::Host(_) => None,
            });
            let weight = Weight { base, replaced: self.replaced(), layer: link.layer, counts: false };
            let values = link.map.forward(&slices(&own), &weight)?;
            for (id, values) in link.made.clone().into_iter().zip(values).chain(settled) {
                self.held_mut().update(backend, id, &mut |buffer| backend.write(buffer, &values));
            }
        }
        Ok(())
    }

    /// Adds to the gradients of the tensors in training what the gradients of those made of them say. Returns what is added
    /// to the loss for the values of the tensors themselves.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn pull(&self, base: &Base<B>, grads: &mut Gradients<B>) -> Result<f64> {
        let (backend, links) = (&base.backend, self.held().links());
        let mut penalty = 0.0;
        for link in links {
            let own = link.values(backend, self.held())?;
            let mut of_made = Vec::with_capacity(link.made.len());
            for id in &link.made {
                let grad = grads.of(*id).expect("what is made has a gradient");
                let mut values = vec![0.0; backend.len(grad)];
                backend.read(grad, &mut values)?;
                of_made.push(values);
            }
            let mut of_own = link.map.backward(&slices(&own), &slices(&of_made));
            penalty += link.map.penalty(&slices(&own), 1.0 / links.len() as f32, &mut of_own);
            for (input, add) in link.own.iter().zip(of_own) {
                let Input::Held(id) = input else { continue };
                let Some(grad) = grads.of(*id).filter(|_| !add.is_empty()) else { continue };
                // It may have a gradient of its own, where it works on the layer as well.
                let mut values = vec![0.0; add.len()];
                backend.read(grad, &mut values)?;
                values.iter_mut().zip(&add).for_each(|(grad, add)| *grad += add);
                backend.write(grad, &values);
            }
        }
        Ok(penalty)
    }
}

impl<B: Backend> Held<B> {
    /// Bytes on the host that one step takes for the largest module, beside what is on the device.
    pub(crate) fn made_bytes(&self) -> u64 {
        let values: Vec<usize> = self.parts().map(|(_, values)| values).collect();
        let of = |link: &Link| {
            let held = link.own.iter().map(|input| match input {
                Input::Held(id) => values[id.number()],
                Input::Host(host) => host.len(),
            });
            2 * (held.sum::<usize>() + link.made.iter().map(|id| values[id.number()]).sum::<usize>())
        };
        self.links().iter().map(|link| 4 * of(link) as u64).max().unwrap_or(0)
    }
}
