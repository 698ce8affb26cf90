//! What stands in for parts of the base and is in training itself: norms (LN tuning, Zhao et al. 2023), biases (BitFit,
//! Ben Zaken et al. 2022), rows of an embedding (trainable tokens). A file has them as whole weights and rows, with which
//! an adapter is served and merged; a run holds them beside the method's own tensors.

use super::attach::Adapters;
use super::forms::LayerForm;
use super::forms::rows::{From, NewRows, NewRowsOnHead, Whose};
use super::held::{Loader, Values};
use super::method::{EMBEDDING, Settings, layer_at};
use super::peft::{Replacements, Rows, WholeTensor};
use super::tensor::{HostTensor, TensorSpec, Tensors};
use super::{Kind, Method, Replaced};
use crate::base::Base;
use crate::error::{Error, Result};
use crate::format::safetensors::Tensor;
use crate::format::widen;
use pocketlora_kernels::{Backend, Call, FloatType, MatrixData, MatrixSource, WorkType};
use pocketlora_models::{Exec, Model, Op, Param, Value};
use safetensors::Dtype;
use std::collections::BTreeSet;
use std::sync::Arc;

/// A tensor of that kind, with what it stands in for.
#[derive(Clone, Debug)]
pub(crate) struct Learned {
    pub spec: TensorSpec,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    Vector(Param),
    Rows { table: Param, ids: Arc<[u32]>, on_head: bool },
}

/// The operations of a whole model, for who asks what its parameters are used for.
#[derive(Default)]
struct Recorder {
    ops: Vec<Op>,
    values: u32,
}

impl Exec for Recorder {
    fn run(&mut self, op: Op) -> Value {
        let first = Value(self.values);
        self.values += op.outputs().len() as u32;
        self.ops.push(op);
        first
    }
}

/// What `model` does before its first layer.
pub(super) fn embedding_ops(model: &dyn Model) -> Vec<Op> {
    let mut recorder = Recorder::default();
    model.embed(&mut recorder);
    recorder.ops
}

/// Weights and biases of norms, and biases of linear layers with their weights: vectors whose gradients are known here.
fn vectors(model: &dyn Model) -> (BTreeSet<u32>, Vec<(u32, Param)>) {
    let mut recorder = Recorder::default();
    let mut x = model.embed(&mut recorder);
    for layer in 0..model.config().layers {
        x = model.layer(&mut recorder, layer, x);
    }
    model.head(&mut recorder, x);
    let (mut norms, mut biases) = (BTreeSet::new(), Vec::new());
    for op in &recorder.ops {
        match op {
            Op::Norm { norm, .. } => norms.extend([norm.weight, norm.bias].into_iter().flatten().map(|p| p.0)),
            Op::Linears { layers, .. } => {
                biases.extend(layers.iter().filter_map(|layer| Some((layer.bias?.0, layer.weight))));
            }
            _ => {}
        }
    }
    (norms, biases)
}

/// Names of norms that LN tuning takes without a word: those of whole hidden states.
pub(super) fn usual_norms(model: &dyn Model) -> Vec<String> {
    let (hidden, params) = (model.config().hidden_size, model.params());
    let whole = vectors(model).0.into_iter().map(|p| &params[p as usize]).filter(|spec| spec.shape == [hidden]);
    let last = |module: &str| module.rsplit('.').next().unwrap_or(module).to_owned();
    whole.map(|spec| last(spec.module())).collect::<BTreeSet<_>>().into_iter().collect()
}

/// Numbers of the norms' parameters whose paths end as `targets` say.
pub(super) fn norms_named(model: &dyn Model, targets: &[String]) -> Result<Vec<u32>> {
    let (norms, params) = (vectors(model).0, model.params());
    let ends = |p: &u32, target: &str| {
        let module = params[*p as usize].module();
        module == target || module.ends_with(&format!(".{target}"))
    };
    if let Some(target) = targets.iter().find(|target| !norms.iter().any(|p| ends(p, target))) {
        let known: BTreeSet<&str> =
            norms.iter().filter_map(|p| params[*p as usize].module().rsplit('.').next()).collect();
        let known = known.into_iter().collect::<Vec<_>>().join("`, `");
        return Err(Error::config("targets", format!("norms of the model, some of `{known}`"), target));
    }
    Ok(norms.into_iter().filter(|p| targets.iter().any(|target| ends(p, target))).collect())
}

/// Whether `whole`, of an adapter of the method `kind`, is in training: copies are kept as they are.
fn learns(kind: Kind, whole: &WholeTensor) -> bool {
    !whole.copy && (whole.kind == "bias" || kind == Kind::LnTuning)
}

impl Replacements {
    /// Those that are in training in an adapter of the method `kind` on `model` that adapts the modules `adapted`.
    ///
    /// # Errors
    /// A vector that is neither of a norm nor of a linear layer.
    pub(crate) fn learned(&self, kind: Kind, model: &dyn Model, adapted: &[String]) -> Result<Vec<Learned>> {
        if self.is_empty() {
            return Ok(Vec::new());
        }
        let (norms, biases) = vectors(model);
        let mut learned = Vec::new();
        for whole in self.whole.iter().filter(|whole| learns(kind, whole)) {
            let at = model.params().iter().position(|spec| spec.name == whole.name());
            let known = |p: &usize| norms.contains(&(*p as u32)) || biases.iter().any(|(b, _)| *b as usize == *p);
            let Some(at) = at.filter(known) else {
                let expected = "only norms and biases of linear layers to be trained as they are";
                return Err(Error::config("init", expected, whole.name()));
            };
            let spec = TensorSpec { name: self.name_of(kind, whole, adapted), shape: whole.tensor.shape.clone() };
            learned.push(Learned { spec, place: Place::Vector(Param(at as u32)) });
        }
        for rows in &self.rows {
            let Some(table) = layer_at(model, &rows.module) else { continue };
            let on_head = rows.module != EMBEDDING || model.config().tied_head;
            let spec = TensorSpec { name: Self::name_of_rows(kind, rows), shape: rows.values.shape.clone() };
            learned.push(Learned { spec, place: Place::Rows { table, ids: rows.ids.clone().into(), on_head } });
        }
        Ok(learned)
    }

    /// The others.
    pub(crate) fn without_learned(&self, kind: Kind) -> Self {
        let whole = self.whole.iter().filter(|whole| !learns(kind, whole)).cloned().collect();
        Self { whole, rows: Vec::new(), ties_copies: self.ties_copies }
    }

    /// How many values those in training have.
    pub(super) fn values_learned(&self, kind: Kind) -> usize {
        let whole = self.whole.iter().filter(|w| learns(kind, w)).map(|w| w.tensor.shape.iter().product::<usize>());
        whole.chain(self.rows.iter().map(|rows| rows.values.data.len())).sum()
    }

    /// Names of those in training, in an adapter that adapts the modules `adapted`.
    pub(crate) fn names_learned(&self, kind: Kind, adapted: &[String]) -> BTreeSet<String> {
        let whole = self.whole.iter().filter(|w| learns(kind, w)).map(|w| self.name_of(kind, w, adapted));
        whole.chain(self.rows.iter().map(|rows| Self::name_of_rows(kind, rows))).collect()
    }

    /// Puts `values` in the place of the one in training that is called `name`.
    pub(crate) fn put(&mut self, kind: Kind, name: &str, values: &[f32]) {
        // However deep a file has it below its module.
        let is_it = |w: &WholeTensor| {
            let below = name.strip_prefix(w.module.as_str()).and_then(|rest| rest.strip_prefix('.'));
            learns(kind, w) && below.is_some_and(|below| below.rsplit('.').next() == Some(w.kind))
        };
        if let Some(whole) = self.whole.iter_mut().find(|w| is_it(w)) {
            whole.tensor = tensor(whole.tensor.shape.clone(), values);
        }
        if let Some(rows) = self.rows.iter_mut().find(|rows| Self::name_of_rows(kind, rows) == name) {
            rows.values.data = values.to_vec();
        }
    }

    /// The values of those in training, by their names.
    fn values(&self, kind: Kind, adapted: &[String]) -> Tensors {
        let whole = self.whole.iter().filter(|w| learns(kind, w)).filter_map(|w| {
            let mut data = vec![0.0; w.tensor.shape.iter().product()];
            widen(w.tensor.float_type()?, &w.tensor.bytes, &mut data);
            Some((self.name_of(kind, w, adapted), HostTensor { shape: w.tensor.shape.clone(), data }))
        });
        let rows = self.rows.iter().map(|rows| (Self::name_of_rows(kind, rows), rows.values.clone()));
        whole.chain(rows).collect()
    }
}

fn tensor(shape: Vec<usize>, values: &[f32]) -> Tensor {
    let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
    Tensor { dtype: Dtype::F32, shape, bytes: bytes.into() }
}

/// What a fresh adapter of `method` puts in place of the weights of `base`: those themselves.
///
/// # Errors
/// A target that names no norm, an id beyond the vocabulary, a base without biases; device lost.
pub(crate) fn fresh<B: Backend>(base: &Base<B>, method: &Method, settings: &Settings) -> Result<Replacements> {
    let model = base.model.as_ref();
    let mut replaced = Replacements::default();
    let whole = |p: u32| -> Result<WholeTensor> {
        let (spec, buffer) = (&model.params()[p as usize], base.vector(Param(p)));
        let mut values = vec![0.0; base.backend.len(buffer)];
        base.backend.read(buffer, &mut values)?;
        let kind = if spec.name.ends_with(".bias") { "bias" } else { "weight" };
        let tensor = tensor(spec.shape.clone(), &values);
        Ok(WholeTensor { module: spec.module().to_owned(), kind, copy: false, tensor })
    };
    if let Method::LnTuning(own) = method {
        replaced.whole = norms_named(model, &own.targets)?.into_iter().map(whole).collect::<Result<_>>()?;
    }
    if settings.bias != "none" && method.kind().reads("bias") {
        let (only, mut biases) = (settings.bias == "lora_only", vectors(model).1);
        let named = |weight: &Param| {
            let module = model.params()[weight.0 as usize].module();
            method.targets().iter().any(|t| module == t || module.ends_with(&format!(".{t}")))
        };
        biases.retain(|(_, weight)| !only || named(weight));
        let numbers: BTreeSet<u32> = biases.into_iter().map(|(bias, _)| bias).collect();
        if numbers.is_empty() {
            let expected = "`none`, for the adapted layers of this base have no biases";
            return Err(Error::config("bias", expected, &settings.bias));
        }
        replaced.whole = numbers.into_iter().map(whole).collect::<Result<_>>()?;
    }
    let ids = &settings.trainable_token_indices;
    if !ids.is_empty() && method.kind().reads("trainable-token-indices") {
        let Some(table) = layer_at(model, EMBEDDING) else {
            let got = format!("a `{}`, whose embedding is called otherwise", model.config().model_type);
            return Err(Error::config("trainable-token-indices", "a model with `embed_tokens`", got));
        };
        let (rows, width) = base.backend.shape(base.matrix(table));
        if let Some(id) = ids.iter().find(|id| **id as usize >= rows) {
            return Err(Error::config("trainable-token-indices", format!("ids below the vocabulary's {rows}"), id));
        }
        let unique: BTreeSet<u32> = ids.iter().copied().collect();
        if unique.len() < ids.len() {
            return Err(Error::config("trainable-token-indices", "each id once", format!("{ids:?}")));
        }
        let mut buffer = base.backend.buffer(ids.len() * width)?;
        base.backend.run(Call::Embed { table: base.matrix(table), ids, y: &mut buffer })?;
        let mut data = vec![0.0; ids.len() * width];
        base.backend.read(&buffer, &mut data)?;
        let values = HostTensor { shape: vec![ids.len(), width], data };
        replaced.rows.push(Rows { module: EMBEDDING.to_owned(), ids: ids.clone(), values });
    }
    Ok(replaced)
}

impl<B: Backend> Adapters<B> {
    /// Attaches `learned`, with the values that `of` has, or with zeros, to count what they take.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn attach_learned(
        &mut self,
        base: &Base<B>,
        learned: &[Learned],
        of: Option<(&Replacements, Kind, &[String])>,
    ) -> Result<()> {
        let specs: Vec<TensorSpec> = learned.iter().map(|one| one.spec.clone()).collect();
        let tensors = of.map(|(replaced, kind, adapted)| replaced.values(kind, adapted));
        let values = tensors.as_ref().map_or(Values::Zeros(&specs), Values::Of);
        let replaced = Replaced::default();
        let mut loader = Loader::new(base, &replaced, values, WorkType::F32, true, self.held());
        let mut forms = Vec::new();
        let mut vectors = Vec::new();
        for Learned { spec, place } in learned {
            match place {
                Place::Vector(param) => vectors.push((*param, loader.at("", None).buffer(&spec.name)?)),
                Place::Rows { table, ids, on_head } => {
                    let rows = loader.at("", None).matrix(&spec.name)?;
                    let is_table = base.model.outline().embedding == *table;
                    if is_table {
                        let form = NewRows { rows: From::Tensor(rows), whose: Whose::Tokens(Arc::clone(ids)) };
                        forms.push((*table, LayerForm::Lookup(Arc::new(form))));
                    }
                    if *on_head {
                        let old = old_rows(base, *table, ids)?;
                        let form = NewRowsOnHead { rows, ids: Arc::clone(ids), old };
                        forms.push((base.model.head_param(), LayerForm::Term(Arc::new(form))));
                    }
                }
            }
        }
        let loaded = loader.finish();
        self.take_learned(loaded, vectors, forms);
        Ok(())
    }
}

/// The rows `ids` of a matrix of the base.
fn old_rows<B: Backend>(base: &Base<B>, table: Param, ids: &[u32]) -> Result<Arc<B::Matrix>> {
    let (backend, matrix) = (&base.backend, base.matrix(table));
    let width = backend.shape(matrix).1;
    let mut rows = backend.buffer(ids.len() * width)?;
    backend.run(Call::Embed { table: matrix, ids, y: &mut rows })?;
    let mut values = vec![0.0; ids.len() * width];
    backend.read(&rows, &mut values)?;
    let data = MatrixData::Dense(FloatType::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect());
    Ok(Arc::new(backend.matrix(MatrixSource { rows: ids.len(), cols: width, data })?))
}
