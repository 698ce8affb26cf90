//! A model with adapters merged into it: a [`Source`] whose weights are the base's, changed while they are read.
//!
//! Nothing is held but the adapters themselves, so that merging takes no more memory than quantizing. Weights that the
//! adapters leave alone keep their bytes where the target stores them as the base does.

mod rounding;
mod weights;

pub use rounding::{Rounding, rounding};

use super::attach::{check_beside, check_shapes, layers_of};
use super::fold::Fold;
use super::{AdapterFile, Kind, Method, layer_at, mark};
use crate::error::{Error, Result};
use crate::format::safetensors::Tensor;
use crate::format::{Existing, Progress, Recipe, Sidecars, Source, Summary, Target, TensorMeta, convert};
use crate::text::Own;
use pocketlora_models::{Layout, Model, ParamSpec, Role};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use weights::{Origin, Weight};

const HEAD: &str = "lm_head.weight";
const TIED: &str = "tie_word_embeddings";
const VOCABULARY: &str = "vocab_size";

/// A base with adapters merged into it.
pub struct Merged {
    base: Box<dyn Source>,
    /// What the base's config says it is.
    model: Box<dyn Model>,
    config: Map<String, Value>,
    weights: Vec<Weight>,
    tensors: Vec<TensorMeta>,
    /// Texts that an adapter brings.
    own: Option<Own>,
    /// Which weights adapters brought, and which adapter did.
    brought: BTreeMap<String, (PathBuf, Tensor)>,
}

impl Merged {
    /// The model `base`, which lies at `place`, with what each of `adapters` does, its effect multiplied by the factor
    /// beside it.
    ///
    /// # Errors
    /// The model cannot run; an adapter is for another model, cannot be merged, or does not go together with one before it.
    pub fn new(base: Box<dyn Source>, place: &Path, adapters: &[(AdapterFile, f32)]) -> Result<Self> {
        crate::base::check_source(base.as_ref(), place)?;
        let model = crate::base::architecture_of(base.config(), place)?;
        let (config, tensors) = (base.config().clone(), base.tensors().to_vec());
        let weights = (0..tensors.len()).map(|i| Weight::new(Origin::Base(i))).collect();
        let mut merged = Self { base, model, config, weights, tensors, own: None, brought: BTreeMap::new() };
        let mut there: Vec<(&Path, Kind)> = Vec::new();
        let fitted =
            adapters.iter().map(|(file, factor)| Ok((file.fitted(merged.model.as_ref())?.into_owned(), *factor)));
        let adapters = fitted.collect::<Result<Vec<_>>>()?;
        for (file, factor) in &adapters {
            file.check_alone("each is merged by itself")?;
            merged.check(file, &there, *factor)?;
            there.push((&file.dir, file.method.kind()));
            merged.replace(file)?;
        }
        merged.check_vocabulary(&adapters)?;
        for (file, factor) in &adapters {
            merged.fold(file, *factor)?;
            merged.take_text(file, place)?;
        }
        Ok(merged)
    }

    /// The 16-bit type that the base has, or binary32 where it is in that: merging into it loses least.
    #[must_use]
    pub fn own_type(&self) -> Target {
        let has = |dtype: &str| self.base.tensors().iter().any(|meta| meta.dtype == dtype);
        match () {
            () if has("BF16") => Target::BF16,
            () if self.base.tensors().iter().all(|meta| meta.dtype == "F32") => Target::F32,
            () => Target::F16,
        }
    }

    /// Writes it as a Hugging Face directory at `out`, as [`quantize`](crate::format::quantize) does. Layers that a 4-bit
    /// base has in 16 bits stay so.
    ///
    /// # Errors
    /// As there, but that a base may be 4-bit already.
    pub fn write(
        &self,
        out: &Path,
        to: Target,
        existing: Existing,
        progress: &mut dyn FnMut(Progress<'_>) -> ControlFlow<()>,
    ) -> Result<Summary> {
        let is_four_bit = |meta: &TensorMeta| matches!(meta.dtype.as_str(), "NF4" | "FP4");
        let linear = |spec: &&ParamSpec| spec.role == Role::Linear;
        let of = |spec: &ParamSpec| self.base.tensors().iter().find(|meta| meta.name == spec.name);
        let linears: Vec<_> = self.model.params().iter().filter(linear).filter_map(|s| Some((s, of(s)?))).collect();
        let mixed = to == Target::Nf4 && linears.iter().any(|(_, meta)| is_four_bit(meta));
        let plain = linears.iter().filter(|(_, meta)| mixed && !is_four_bit(meta));
        let skip = plain.map(|(spec, _)| spec.module().to_owned()).collect();
        convert(self, out, &Recipe { to, skip }, existing, progress)
    }

    /// Refuses an adapter that does not fit the model or what was merged before it.
    fn check(&self, file: &AdapterFile, there: &[(&Path, Kind)], factor: f32) -> Result<()> {
        mark::check_read(self.model.config(), file, &mut |ids| self.embedded(ids))?;
        check_beside(there, file, factor)?;
        if file.method.kind().parts().is_empty() && !file.method.kind().shared().is_empty() {
            let what = format!("to merge {}, which is beside the weights and not in them,", file.method.kind().name());
            return Err(Error::unsupported(&file.dir, what, "use the adapter with `-a` instead"));
        }
        Ok(())
    }

    /// What tells that `file` was trained on another base than this, though nothing that stops it from working.
    ///
    /// # Errors
    /// The base cannot be read.
    pub fn doubt(&self, file: &AdapterFile) -> Result<Option<String>> {
        let params = self.model.params();
        mark::doubt_read(self.model.as_ref(), file, &mut |number, rows| {
            let at = self.base.tensors().iter().position(|meta| meta.name == params[number].name);
            let mut values = vec![0.0; rows.len() * params[number].shape[1]];
            self.base.read_rows(at.expect("the base was checked to have all its weights"), rows, &mut values)?;
            Ok(values)
        })
    }

    /// The rows `ids` of the base's embedding.
    fn embedded(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let hidden = self.model.config().hidden_size;
        let at = self.find(&self.embedding().name).expect("the base was checked to have all its weights");
        let mut all = vec![0.0; ids.len() * hidden];
        for (id, row) in ids.iter().zip(all.chunks_exact_mut(hidden)) {
            self.base.read_rows(at, *id as usize..*id as usize + 1, row)?;
        }
        Ok(all)
    }

    fn embedding(&self) -> &ParamSpec {
        let found = self.model.params().iter().find(|p| p.role == Role::Embedding);
        found.expect("every language model has an embedding")
    }

    fn find(&self, name: &str) -> Option<usize> {
        self.tensors.iter().position(|meta| meta.name == name)
    }

    /// The number of the weight of the layer at the path `module`. A tied head that is changed alone becomes a weight of
    /// its own.
    fn layer(&mut self, module: &str) -> Option<usize> {
        let param = layer_at(self.model.as_ref(), module)?;
        let spec = &self.model.params()[param.0 as usize];
        let name = spec.name.clone();
        if spec.role == Role::Embedding && self.model.config().tied_head {
            // Terms are on what is looked up, or on the head: the other one keeps what it has.
            let head = self.own_head();
            return if name.strip_suffix(".weight") == Some(module) { self.find(&name) } else { Some(head) };
        }
        self.find(&name)
    }

    /// The number of the head's weight, which is no longer the embedding's from then on.
    fn own_head(&mut self) -> usize {
        if let Some(at) = self.find(HEAD) {
            return at;
        }
        let table = self.find(&self.embedding().name.clone()).expect("the base was checked to have all its weights");
        self.tensors.push(TensorMeta { name: HEAD.to_owned(), ..self.tensors[table].clone() });
        self.weights.push(self.weights[table].without_folds());
        self.config.insert(TIED.to_owned(), Value::Bool(false));
        self.tensors.len() - 1
    }

    /// Folds what `file` does at its layers into their weights.
    fn fold(&mut self, file: &AdapterFile, factor: f32) -> Result<()> {
        layers_of(self.model.as_ref(), file)?;
        for module in file.modules() {
            let at = self.layer(module).expect("asked just now");
            let [out, input] = self.tensors[at].shape[..] else { unreachable!("a layer's weight is a matrix") };
            if self.has_columns(at) {
                let what = format!("to merge into `{module}`, which is stored as columns,");
                let next = "quantize the model first (`pocketlora quantize`), and merge into that";
                return Err(Error::unsupported(&file.dir, what, next));
            }
            check_shapes(file, module, [out, input])?;
            let fold = file.method.fold(module, [out, input], &file.tensors, factor).ok_or_else(|| {
                let activated = matches!(&file.method, Method::Lora(lora) if lora.invocation.is_some());
                let why = if activated { ", which works from its invocation tokens on," } else { "" };
                let what = format!("to merge {}{why}", file.method.kind().name());
                Error::unsupported(&file.dir, what, "use the adapter with `-a` instead")
            })?;
            let fold: Arc<dyn Fold> = fold.into();
            match self.find(&format!("{module}.bias")) {
                Some(bias) => self.weights[bias].push(Arc::clone(&fold)),
                None if fold.needs_bias() => {
                    let what = format!("to merge the bias that it adds to `{module}`, a layer without one,");
                    return Err(Error::unsupported(&file.dir, what, "use the adapter with `-a` instead"));
                }
                None => {}
            }
            self.weights[at].push(fold);
        }
        Ok(())
    }

    /// Whether weight number `at` lies in the base as columns, as GPT-2's do: rows that are read of it are none of the layer's.
    fn has_columns(&self, at: usize) -> bool {
        let name = &self.tensors[at].name;
        let stored = self.model.params().iter().find(|spec| spec.name == *name).map(|spec| spec.layout);
        stored == Some(Layout::Transposed) && !self.by_rows(at)
    }

    /// Takes the tokenizer and the template that `file` brings.
    fn take_text(&mut self, file: &AdapterFile, place: &Path) -> Result<()> {
        if !place.is_dir() {
            return Ok(());
        }
        let Some(own) = Own::find(&file.dir, place, file.vocabulary().is_some())? else { return Ok(()) };
        if let Some(there) = &self.own {
            own.agree(there)?;
        }
        self.own = Some(own);
        Ok(())
    }
}

impl Source for Merged {
    fn config(&self) -> &Map<String, Value> {
        &self.config
    }

    fn tensors(&self) -> &[TensorMeta] {
        &self.tensors
    }

    fn read_rows(&self, index: usize, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.weights[index].read(self.base.as_ref(), &self.tensors[index], rows, out)
    }

    fn nf4(&self, index: usize) -> Vec<(&'static str, Tensor)> {
        match self.weights[index].unchanged() {
            Some(at) => self.base.nf4(at),
            None => Vec::new(),
        }
    }

    fn by_rows(&self, index: usize) -> bool {
        self.weights[index].of_base().is_some_and(|at| self.base.by_rows(at))
    }

    fn sidecars(&self) -> Result<Sidecars> {
        let base = self.base.sidecars()?;
        self.own.as_ref().map_or(Ok(base.clone()), |own| own.over(base))
    }

    fn files(&self) -> Vec<PathBuf> {
        self.base.files()
    }
}
