//! Tensors that are made of those in an adapter's file, for methods whose file does not hold what works on a layer. A
//! [`Map`] says how, on the host, and carries gradients back: the device works with the made ones, in training an
//! optimizer moves the file's. Once a step the made tensors' gradients are read, become gradients of the file's
//! tensors, and after the optimizer's step the made ones are made anew.

use super::attach::Adapters;
use super::forms::Gradients;
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

    /// The same for what asks for the layer's `weight` once more.
    ///
    /// # Errors
    /// Out of memory.
    fn backward_on(&self, own: &[&[f32]], grads: &[&[f32]], _weight: &dyn LayerWeight) -> Result<Vec<Vec<f32>>> {
        Ok(self.backward(own, grads))
    }

    /// Which part training puts to other values before it is used, and these: what keeps it within its bounds.
    fn settled(&self, _own: &[&[f32]]) -> Option<(usize, Vec<f32>)> {
        None
    }

    /// Which part a step puts to other values after the optimizer has moved it at the learning rate `lr`, and these.
    fn shrunk(&self, _own: &[&[f32]], _lr: f32) -> Option<(usize, Vec<f32>)> {
        None
    }

    /// Chooses by `key` what it makes of its parts until the step is done. Whether it has a choice.
    fn draw(&self, _key: u64) -> bool {
        false
    }

    /// Hears how many steps are done, before it makes anything of what they left.
    fn at(&self, _step: u64) {}

    /// What training adds to the loss for the values of the parts themselves, times `weight`; adds its gradient to
    /// `grads`.
    fn penalty(&self, _own: &[&[f32]], _weight: f32, _grads: &mut [Vec<f32>]) -> f64 {
        0.0
    }
}

/// Where the values of a part are.
pub(super) enum Input {
    /// On the device, in training.
    Held(TensorId),
    /// Here, with its name in the file: it stays as it is. Empty where memory is counted.
    Host(String, Vec<f32>),
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
            Input::Host(_, values) => Ok(values.clone()),
        };
        self.own.iter().map(one).collect()
    }
}

fn slices(values: &[Vec<f32>]) -> Vec<&[f32]> {
    values.iter().map(Vec::as_slice).collect()
}

impl<B: Backend> Adapters<B> {
    /// Has all maps that have a choice choose by `key`, until [`Adapters::renew`]. Whether any has.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn draw(&mut self, base: &Base<B>, key: u64) -> Result<bool> {
        let mut any = false;
        self.held().links().iter().for_each(|link| any |= link.map.draw(key));
        if any {
            self.make(base)?;
        }
        Ok(any)
    }

    /// Puts tensors in training to the values that a step at the learning rate `lr` leaves them.
    ///
    /// # Errors
    /// Device lost.
    pub(crate) fn shrink(&mut self, base: &Base<B>, lr: f32) -> Result<()> {
        let (backend, mut moved) = (&base.backend, Vec::new());
        for link in self.held().links() {
            let own = link.values(backend, self.held())?;
            let Some((part, values)) = link.map.shrunk(&slices(&own), lr) else { continue };
            if let Input::Held(id) = &link.own[part] {
                moved.push((*id, values));
            }
        }
        for (id, values) in moved {
            self.held_mut().update(backend, id, &mut |buffer| backend.write(buffer, &values));
        }
        Ok(())
    }

    /// Makes made tensors anew, after the ones that they are made of were moved in `step` steps; these are put into their bounds
    /// first.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn renew(&mut self, base: &Base<B>, step: u64) -> Result<()> {
        self.held().links().iter().for_each(|link| link.map.at(step));
        self.make(base)
    }

    fn make(&mut self, base: &Base<B>) -> Result<()> {
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
                Input::Host(..) => None,
            });
            let weight = Weight { base, replaced: self.replaced(), layer: link.layer, counts: false };
            let values = link.map.forward(&slices(&own), &weight)?;
            for (id, values) in link.made.clone().into_iter().zip(values).chain(settled) {
                self.held_mut().update(backend, id, &mut |buffer| backend.write(buffer, &values));
            }
        }
        Ok(())
    }

    /// Adds to the gradients of the tensors in training what the gradients of those made of them say. Returns what is
    /// added to the loss for the values of the tensors themselves.
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
            let weight = Weight { base, replaced: self.replaced(), layer: link.layer, counts: false };
            let mut of_own = link.map.backward_on(&slices(&own), &slices(&of_made), &weight)?;
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
                Input::Host(_, host) => host.len(),
            });
            2 * (held.sum::<usize>() + link.made.iter().map(|id| values[id.number()]).sum::<usize>())
        };
        self.links().iter().map(|link| 4 * of(link) as u64).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::kinds::Kind;
    use crate::adapter::peft::Keys;
    use crate::rng::normals;
    use serde_json::{Value, json};

    const LAYER: [usize; 2] = [12, 8];
    const MODULE: &str = "model.layers.0.self_attn.q_proj";

    /// A weight on the host.
    struct Plain(Vec<f32>);

    impl LayerWeight for Plain {
        fn shape(&self) -> [usize; 2] {
            LAYER
        }

        fn times(&self, x: &[f32]) -> Result<Vec<f32>> {
            let row = |x: &[f32]| -> Vec<f32> {
                self.0.chunks(LAYER[1]).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum()).collect()
            };
            Ok(x.chunks(LAYER[1]).flat_map(row).collect())
        }

        fn back(&self, y: &[f32]) -> Result<Vec<f32>> {
            let column = |y: &[f32], c: usize| y.iter().zip(self.0.chunks(LAYER[1])).map(|(y, w)| y * w[c]).sum();
            Ok(y.chunks(LAYER[0]).flat_map(|y| (0..LAYER[1]).map(move |c| column(y, c))).collect())
        }

        fn squares(&self) -> Result<[Vec<f64>; 2]> {
            let square = |w: &f32| f64::from(*w) * f64::from(*w);
            let rows = self.0.chunks(LAYER[1]).map(|row| row.iter().map(square).sum()).collect();
            let columns = (0..LAYER[1]).map(|c| self.0.iter().skip(c).step_by(LAYER[1]).map(square).sum()).collect();
            Ok([rows, columns])
        }

        fn bias(&self) -> Result<Option<Vec<f32>>> {
            Ok(Some(normals(&[77], 1.0, LAYER[0])))
        }
    }

    /// Configs by which each method is tried; of those that are not named here, PEFT's defaults.
    fn configs(kind: Kind) -> Vec<Value> {
        let blocks = |a: &str, b: &str| json!({"nblocks": 2, "target_modules_bd_a": [a], "target_modules_bd_b": [b]});
        match kind {
            Kind::Lora | Kind::Ia3 | Kind::PrefixTuning => vec![],
            Kind::Dora => vec![json!({"r": 3, "lora_alpha": 5})],
            Kind::LoraFa => vec![json!({"r": 3, "lora_alpha": 5})],
            Kind::Bdlora => [blocks("q_proj", "x"), blocks("x", "q_proj")]
                .map(|of| json!({"r": 4, "lora_alpha": 5, "use_bdlora": of}))
                .into(),
            Kind::Miss => vec![json!({"r": 3}), json!({"r": 3, "init_weights": "mini", "mini_r": 4})],
            Kind::Adalora => vec![json!({"init_r": 3})],
            Kind::Melora => vec![json!({"r": 4, "mini_loras": 2})],
            Kind::Road => [1, 2, 4].map(|n| json!({"group_size": 4, "variant": format!("road_{n}")})).into(),
            Kind::Gralora => vec![json!({"r": 4}), json!({"r": 4, "hybrid_r": 2})],
            Kind::Hra => vec![json!({"r": 3}), json!({"r": 3, "apply_GS": true})],
            Kind::Oft => vec![
                json!({"oft_block_size": 4}),
                json!({"oft_block_size": 4, "use_cayley_neumann": false}),
                json!({"r": 4, "oft_block_size": 0, "block_share": true}),
            ],
            Kind::C3a => vec![json!({"block_size": 4}), json!({"block_size": 1})],
            Kind::Boft => {
                vec![json!({"boft_block_size": 4}), json!({"boft_block_size": 2, "boft_n_butterfly_factor": 3})]
            }
            Kind::Fourierft => vec![json!({"n_frequency": 40})],
            Kind::MultitaskPromptTuning => vec![],
            Kind::Lokr => vec![json!({"r": 1}), json!({"r": 1, "decompose_both": true, "decompose_factor": 4})],
            _ => vec![json!({"r": 3})],
        }
    }

    /// The loss of made tensors whose gradients are `grads`, with what the parts themselves add to it.
    fn loss(map: &dyn Map, own: &[Vec<f32>], grads: &[Vec<f32>], weight: &Plain) -> f64 {
        let made = map.forward(&slices(own), weight).unwrap();
        let of = |(made, grad): (&Vec<f32>, &Vec<f32>)| -> f64 {
            made.iter().zip(grad).map(|(x, g)| f64::from(*x) * f64::from(*g)).sum()
        };
        let mut unread: Vec<Vec<f32>> = own.iter().map(|part| vec![0.0; part.len()]).collect();
        made.iter().zip(grads).map(of).sum::<f64>() + map.penalty(&slices(own), 1.0, &mut unread)
    }

    #[test]
    fn gradients_of_all_maps_are_those_of_differences() {
        let weight = Plain(normals(&[1], 1.0, LAYER[0] * LAYER[1]));
        let on_layers = Kind::ALL.iter().filter(|kind| !kind.parts().is_empty());
        for (kind, config) in on_layers.flat_map(|kind| configs(*kind).into_iter().map(move |c| (*kind, c))) {
            let name = format!("{} of {config}", kind.name());
            let config = config.as_object().unwrap();
            let mut method = kind.read(&Keys::of_settings(config, kind.keys())).unwrap();
            if kind == Kind::Lokr {
                let both = config.contains_key("decompose_both");
                method.note_parts(MODULE, if both { &["lokr_w1_a", "lokr_w2_a"] } else { &["lokr_w2_a"] });
            }
            let Some(map) = method.plan(MODULE, &weight, 1.0).unwrap().map else { continue };
            let shapes = method.shapes(MODULE, LAYER);
            let mut own: Vec<Vec<f32>> =
                (shapes.iter().zip(0..)).map(|(shape, i)| normals(&[2, i], 0.5, shape.iter().product())).collect();
            let made = map.forward(&slices(&own), &weight).unwrap();
            let grads: Vec<Vec<f32>> =
                made.iter().zip(0..).map(|(made, i)| normals(&[3, i], 1.0, made.len())).collect();
            let mut found = map.backward_on(&slices(&own), &slices(&grads), &weight).unwrap();
            map.penalty(&slices(&own), 1.0, &mut found);
            assert_eq!(found.len(), own.len(), "{name}");
            for (part, found) in found.iter().enumerate().filter(|(_, found)| !found.is_empty()) {
                assert_eq!(found.len(), own[part].len(), "{name}");
                let step = 1.0 / 128.0;
                let expected: Vec<f64> = (0..found.len())
                    .map(|i| {
                        let old = own[part][i];
                        let at = |own: &mut Vec<Vec<f32>>, value| {
                            own[part][i] = value;
                            loss(map.as_ref(), own, &grads, &weight)
                        };
                        // Of four points, so that what is left of the step is its fourth power.
                        let [far, near] =
                            [2.0, 1.0].map(|n: f32| at(&mut own, old + n * step) - at(&mut own, old - n * step));
                        own[part][i] = old;
                        (8.0 * near - far) / (12.0 * f64::from(step))
                    })
                    .collect();
                let norm = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
                let error = norm(&mut found.iter().zip(&expected).map(|(f, e)| f64::from(*f) - e));
                let relative = error / norm(&mut expected.iter().copied());
                assert!(relative < 1e-3, "{name}, part {part}: off by {relative:.1e} of the norm");
            }
        }
    }
}
