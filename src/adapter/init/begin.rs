//! Gives a fresh LoRA the values that it begins with.

use super::{Init, Operator, Progress, Sketch, activations, from_weight, go_on, loftq, orthogonal_halves, put};
use crate::adapter::method::layer_at;
use crate::adapter::methods::lora::Lora;
use crate::adapter::weight::Weight;
use crate::adapter::{Replaced, Tensors};
use crate::base::Base;
use crate::error::{Error, Result};
use crate::format::Source;
use crate::rng::mix;
use pocketlora_kernels::Backend;
use pocketlora_models::{Model, Param};

/// Stream of random numbers for directions that are followed.
const STREAM: u64 = 9;

/// A module of a fresh LoRA.
struct Module {
    path: String,
    layer: Param,
    rank: usize,
    scale: f32,
}

impl Lora {
    /// The modules on linear layers that have `tensors`.
    fn modules(&self, model: &dyn Model, tensors: &Tensors) -> Vec<Module> {
        let module = |name: &String| {
            let path = name.strip_suffix(".lora_A.weight")?.to_owned();
            let (rank, scale) = self.of_module(&path);
            Some(Module { layer: layer_at(model, &path)?, path, rank, scale })
        };
        tensors.keys().filter_map(module).collect()
    }

    /// Refuses layers, of those that have `tensors`, that it cannot look at, or that a `source` lacks, before any work.
    ///
    /// # Errors
    /// CorDA on a layer that is none of the decoder's; a layer that is not in the source, has another shape, or is in 4
    /// bits there as well.
    pub(crate) fn check_beginning<B: Backend>(
        &self,
        base: &Base<B>,
        tensors: &Tensors,
        source: Option<&dyn Source>,
    ) -> Result<()> {
        let (modules, replaced) = (self.modules(base.model.as_ref(), tensors), Replaced::default());
        if matches!(self.init, Init::Corda(_)) {
            activations::places_of(base.model.as_ref(), modules.iter().map(|module| module.layer))?;
        }
        let Some(source) = source else { return Ok(()) };
        modules.iter().try_for_each(|module| {
            let weight = Weight { base, replaced: &replaced, layer: module.layer, counts: false };
            loftq::place(&weight, source).map(|_| ())
        })
    }

    /// Puts what it begins with into its fresh `tensors` on `base`; what it looks at is `texts`, and a `source` with
    /// the base's weights in more bits. `progress` hears how much of it is done, and whether it goes on is its answer.
    /// A beginning from gradients is a [`Sketch`]'s.
    ///
    /// # Errors
    /// There is no source and it needs one, or that has other weights; an id beyond the vocabulary; stopped; out of memory.
    pub(crate) fn begin_with<B: Backend>(
        &self,
        base: &Base<B>,
        tensors: &mut Tensors,
        texts: &[Vec<u32>],
        source: Option<&dyn Source>,
        seed: u64,
        progress: &mut Progress<'_>,
    ) -> Result<()> {
        let modules = self.modules(base.model.as_ref(), tensors);
        let (seed, replaced) = (mix(seed, STREAM), Replaced::default());
        match self.init {
            Init::Plain | Init::Gaussian | Init::LoraGa => {}
            Init::Eva => {
                let layers: Vec<(Param, usize)> = modules.iter().map(|m| (m.layer, m.rank)).collect();
                let found = activations::components(base, &layers, texts, seed, progress)?;
                for (module, a) in modules.iter().zip(found) {
                    if let Some(own) = tensors.get_mut(&format!("{}.lora_A.weight", module.path)) {
                        own.data = a;
                    }
                }
            }
            Init::Corda(keep) => {
                let layers: Vec<(Param, usize, f32)> = modules.iter().map(|m| (m.layer, m.rank, m.scale)).collect();
                let each = &mut |i: usize, halves| put(tensors, &modules[i].path, halves);
                activations::covariances(base, &layers, texts, keep, seed, each, progress)?;
            }
            Init::Orthogonal | Init::Pissa(_) | Init::Milora | Init::Olora | Init::Loftq => {
                for (i, Module { path, layer, rank, scale }) in modules.iter().enumerate() {
                    go_on(progress, i, modules.len())?;
                    let seed = mix(seed, i as u64);
                    let weight = Weight { base, replaced: &replaced, layer: *layer, counts: false };
                    let halves = match self.init {
                        Init::Orthogonal => Some(orthogonal_halves(Operator::shape(&weight), *rank, seed)),
                        Init::Loftq => {
                            let source = source.ok_or_else(|| {
                                Error::config("loftq-source", "a model with the base's weights in 16 bits", "none")
                            })?;
                            from_weight(self.init, &loftq::Rounded::read(&weight, source)?, *rank, *scale, seed)?
                        }
                        _ => from_weight(self.init, &weight, *rank, *scale, seed)?,
                    };
                    halves.into_iter().for_each(|halves| put(tensors, path, halves));
                }
            }
        }
        Ok(())
    }

    /// The gradients that it asks for to begin with, if it does.
    pub(crate) fn sketch(&self, model: &dyn Model, tensors: &Tensors, seed: u64) -> Option<Sketch> {
        let shape = |p: Param| {
            let shape = &model.params()[p.0 as usize].shape;
            [shape[0], shape[1]]
        };
        let modules = self.modules(model, tensors).into_iter().map(|m| (m.path, shape(m.layer), m.rank)).collect();
        (self.init == Init::LoraGa).then(|| Sketch::new(modules, mix(seed, STREAM)))
    }
}
