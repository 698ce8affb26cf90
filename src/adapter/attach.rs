//! The adapters attached to a model: what they do at each of its places.

use super::forms::rows::{From, NewRows, Whose};
use super::forms::{LayerForm, OnLayer, Prefix, Term};
use super::held::{Held, Loaded, Loader, TensorId, Values};
use super::method::layer_at;
use super::{AdapterFile, Kind, Method, Replaced, TensorSpec, mark};
use crate::base::Base;
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::{Backend, WorkType};
use pocketlora_models::{Model, Param};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The adapters attached to a model. Several of one method work together, in the order in which they were attached.
pub struct Adapters<B: Backend> {
    held: Held<B>,
    by_param: Vec<OnLayer<B>>,
    prefix: Option<Prefix>,
    /// Vectors in training, in place of the base's, by the number of the parameter.
    vectors: BTreeMap<u32, TensorId>,
    /// The tokens behind which adapters with such work.
    invocation: Option<Arc<[u32]>>,
    /// Weights that they bring with them, in place of the base's.
    replaced: Replaced<B>,
    /// What each of them brought.
    there: Vec<There<B>>,
}

/// What one attached adapter brought.
struct There<B: Backend> {
    dir: PathBuf,
    kind: Kind,
    /// It belongs to the one before it, beside which it was trained.
    beside: bool,
    /// Its number among those whose tensors are held.
    owner: usize,
    /// What it does on layers.
    forms: Vec<(Param, LayerForm<B>)>,
    /// It brought nothing else, such as weights in place of the base's: others can be used without it.
    alone: bool,
    /// It brought no weight in place of the base's, whose effect could not be multiplied.
    scales: bool,
}

impl<B: Backend> Clone for There<B> {
    fn clone(&self) -> Self {
        let (dir, forms) = (self.dir.clone(), self.forms.clone());
        Self { dir, forms, ..*self }
    }
}

impl<B: Backend> Adapters<B> {
    /// None.
    pub fn none(base: &Base<B>) -> Self {
        let by_param = base.model.params().iter().map(|_| OnLayer::default()).collect();
        Self {
            held: Held::default(),
            by_param,
            prefix: None,
            vectors: BTreeMap::new(),
            invocation: None,
            replaced: Replaced::default(),
            there: Vec::new(),
        }
    }

    /// What they do on the linear layer with weight `p`.
    pub fn on(&self, p: Param) -> &OnLayer<B> {
        &self.by_param[p.0 as usize]
    }

    /// What comes before each sequence's own tokens, if an adapter has such.
    #[must_use]
    pub fn before(&self) -> Option<&Prefix> {
        self.prefix.as_ref()
    }

    /// Of that, keys and values.
    #[must_use]
    pub fn prefix(&self) -> Option<&Prefix> {
        self.prefix.as_ref().filter(|prefix| !prefix.is_read())
    }

    /// How many virtual tokens are read before a sequence's own.
    #[must_use]
    pub fn prompt_tokens(&self) -> usize {
        self.prefix.as_ref().filter(|prefix| prefix.is_read()).map_or(0, |prefix| prefix.tokens)
    }

    /// The vector `p` of `base`, unless one of them has another.
    pub(crate) fn vector<'a>(&'a self, base: &'a Base<B>, p: Param) -> &'a B::Buffer {
        self.vectors.get(&p.0).map_or_else(|| self.replaced.vector(base, p), |id| self.held.buffer(*id))
    }

    /// The number of the tensor in training that stands in for the vector `p`.
    pub(crate) fn learned_vector(&self, p: Option<Param>) -> Option<TensorId> {
        self.vectors.get(&p?.0).copied()
    }

    /// Virtual tokens before a sequence's own.
    #[must_use]
    pub fn virtual_tokens(&self) -> usize {
        self.prefix.as_ref().map_or(0, |prefix| prefix.tokens)
    }

    /// The tokens from whose last occurrence in a text on those adapters work that have an invocation (activated LoRA).
    pub(crate) fn invocation(&self) -> Option<&Arc<[u32]>> {
        self.invocation.as_ref()
    }

    /// Whether sequences with them cannot share products with those of others, for they multiply by other weights.
    pub(crate) fn is_alone(&self) -> bool {
        !self.replaced.is_empty() || !self.vectors.is_empty()
    }

    /// What stands in for weights of the base.
    #[must_use]
    pub fn replaced(&self) -> &Replaced<B> {
        &self.replaced
    }

    /// Their tensors.
    #[must_use]
    pub fn held(&self) -> &Held<B> {
        &self.held
    }

    /// Their tensors, to be trained.
    pub fn held_mut(&mut self) -> &mut Held<B> {
        &mut self.held
    }

    /// Attaches what `file` does with its effect multiplied by `factor`, and puts the weights that come with it in place of
    /// the base's.
    ///
    /// # Errors
    /// A module or shape that this base does not have; a weight that another adapter brings, too, or a factor where
    /// there is nothing to multiply; another method than that of the adapters there are. All is as it was then, but for a
    /// file of which only one beside it fails.
    pub fn attach(&mut self, base: &Base<B>, file: &AdapterFile, factor: f32, dtype: WorkType) -> Result<()> {
        self.attach_as(base, file, factor, dtype, false)
    }

    /// Whether `file` brings nothing but what it does on layers, whose effect can be multiplied: what [`Adapters::mixed`] can do
    /// with and without.
    pub(crate) fn takes_for_mixing(file: &AdapterFile) -> bool {
        let takes = |file: &AdapterFile| {
            let kind = file.method.kind();
            kind.has_strength() && kind.adds_up() && file.replaced.is_empty() && file.method.invocation().is_none()
        };
        std::iter::once(file).chain(&file.beside).all(takes)
    }

    /// As [`Adapters::attach`], for training: tensors of the file are there for an optimizer to move, in f32.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn attach_to_train(&mut self, base: &Base<B>, file: &AdapterFile) -> Result<()> {
        self.attach_as(base, file, 1.0, WorkType::F32, true)
    }

    fn attach_as(
        &mut self,
        base: &Base<B>,
        file: &AdapterFile,
        factor: f32,
        dtype: WorkType,
        trains: bool,
    ) -> Result<()> {
        self.attach_one(base, file, false, factor, dtype, trains)?;
        file.beside.iter().try_for_each(|other| self.attach_one(base, other, true, factor, dtype, trains))
    }

    /// As [`Adapters::attach`], without what is beside `file`.
    fn attach_one(
        &mut self,
        base: &Base<B>,
        file: &AdapterFile,
        beside: bool,
        factor: f32,
        dtype: WorkType,
        trains: bool,
    ) -> Result<()> {
        let fitted = file.fitted(base.model.as_ref())?;
        let file = fitted.as_ref();
        mark::check(base, file)?;
        let place = || format!("`{}`", file.dir.display());
        let mismatch = |message: String| Error::new(ErrorCode::AdapterMismatch, place(), message);
        let kind = file.method.kind();
        let there: Vec<(&Path, Kind)> = self.there.iter().map(|there| (there.dir.as_path(), there.kind)).collect();
        check_beside(&there, file, factor)?;
        let invocation = file.method.invocation();
        if let (Some(there), Some(own)) = (&self.invocation, invocation)
            && there[..] != *own
        {
            let message = format!(
                "expected the invocation tokens `{there:?}`, which an attached adapter has, got `{own:?}`; attach one of the \
                 two"
            );
            return Err(mismatch(message));
        }
        // All are built before any is attached: a mismatch in the last one must leave the model as it was.
        let replaced = self.replaced.with(base, file)?;
        let at = layers_of(base.model.as_ref(), file)?;
        for (param, module) in &at {
            check_shapes(file, module, replaced.shape(base, *param))?;
        }
        for spec in file.method.shared(base.model.as_ref()).map_err(|e| e.at(place()))? {
            let got = file.tensors.get(&spec.name).map(|t| &t.shape);
            if got != Some(&spec.shape) {
                let (name, expected, got) = (&spec.name, &spec.shape, shape_text(got));
                return Err(mismatch(format!("expected `{name}` of shape `{expected:?}`, got {got}")));
            }
        }
        for (i, _) in self.by_param.iter().enumerate().filter(|(_, on)| !on.is_empty()) {
            let param = Param(i as u32);
            if replaced.shape(base, param) != self.replaced.shape(base, param) {
                let name = &base.model.params()[i].name;
                let message = format!("it brings another `{name}` than an attached adapter works on; attach it first");
                return Err(mismatch(message));
            }
        }
        let loader = Loader::new(base, &replaced, Values::Of(&file.tensors), dtype, trains, &self.held);
        let (owner, mut forms) = self.place(base, &file.method, loader, at, factor)?;
        for (head, term) in replaced.on_head(base, file) {
            let form = LayerForm::Term(Arc::new(term));
            self.by_param[head.0 as usize].push(form.clone());
            forms.push((head, form));
        }
        let scales = file.replaced.is_empty();
        let alone = scales && invocation.is_none() && !kind.reads("num-virtual-tokens");
        self.there.push(There { dir: file.dir.clone(), kind, beside, owner, forms, alone, scales });
        self.invocation = invocation.map(Arc::from).or(self.invocation.take());
        self.replaced = replaced;
        Ok(())
    }

    /// Those of them that `picks` names by their places in the order in which they were attached, with the effect of each
    /// multiplied by the number beside it. They share their tensors with these: nothing is read or copied. None where one that is
    /// left out brought more than what it does on layers.
    ///
    /// # Errors
    /// What one does has no strength.
    pub(crate) fn mixed(&self, picks: &[(usize, f32)]) -> Result<Option<Self>> {
        // Those that were trained beside each other go together.
        let groups: Vec<&[There<B>]> = self.there.chunk_by(|_, next| next.beside).collect();
        let left_out = |(at, group): (usize, &&[There<B>])| {
            group.iter().any(|there| !there.alone) && picks.iter().all(|(pick, _)| *pick != at)
        };
        if groups.iter().enumerate().any(left_out) {
            return Ok(None);
        }
        let mut strengths = self.held.strengths().to_vec();
        let mut by_param: Vec<OnLayer<B>> = self.by_param.iter().map(|_| OnLayer::default()).collect();
        let mut there = Vec::with_capacity(picks.len());
        let picked = picks.iter().flat_map(|(at, factor)| groups[*at].iter().map(move |one| (one, factor)));
        for (one, factor) in picked {
            check_factor(&one.dir, one.kind, *factor)?;
            if *factor != 1.0 && !one.scales {
                return Ok(None);
            }
            strengths[one.owner] = *factor;
            for (param, form) in &one.forms {
                by_param[param.0 as usize].push(form.clone());
            }
            there.push(one.clone());
        }
        Ok(Some(Self {
            held: self.held.with_strengths(strengths),
            by_param,
            prefix: self.prefix.clone(),
            vectors: BTreeMap::new(),
            invocation: self.invocation.clone(),
            replaced: self.replaced.clone(),
            there,
        }))
    }

    /// As [`Adapters::attach_zeros`], of one that is beside the one in training: its tensors stay as they are unless somebody
    /// moves them. Returns their names.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn attach_fixed_zeros(
        &mut self,
        base: &Base<B>,
        method: &Method,
        specs: &[TensorSpec],
    ) -> Result<Vec<(String, TensorId)>> {
        let first = self.held.len();
        self.attach_zeros(base, method, specs)?;
        Ok(self.held.fix(first))
    }

    /// Whether something that is added to what the embedding gives is in training.
    pub(crate) fn learns_embedding(&self, base: &Base<B>) -> bool {
        !self.on(base.model.outline().embedding).lookups.is_empty()
    }

    /// Attaches an adapter of `method` with tensors `specs`, all zeros, to count what it takes.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn attach_zeros(&mut self, base: &Base<B>, method: &Method, specs: &[TensorSpec]) -> Result<()> {
        let modules: Vec<&str> = specs.iter().filter_map(|spec| method.kind().module_of(&spec.name)).collect();
        let layers = modules.into_iter().filter_map(|module| Some((layer_at(base.model.as_ref(), module)?, module)));
        self.invocation = method.invocation().map(Arc::from).or(self.invocation.take());
        let (at, replaced) = (layers.collect(), std::mem::take(&mut self.replaced));
        let loader = Loader::new(base, &replaced, Values::Zeros(specs), WorkType::F32, true, &self.held);
        let placed = self.place(base, method, loader, at, 1.0);
        self.replaced = replaced;
        placed.map(|_| ())
    }

    /// Builds what `method` does at each of the layers `at` and elsewhere, then attaches it with its effect multiplied by
    /// `factor`. Returns its number among those whose tensors are held, and what it does on layers.
    fn place(
        &mut self,
        base: &Base<B>,
        method: &Method,
        mut loader: Loader<'_, B>,
        mut at: Vec<(Param, &str)>,
        factor: f32,
    ) -> Result<Placed<B>> {
        at.sort_by_key(|(param, _)| param.0);
        let mut forms = Vec::with_capacity(at.len());
        for (param, module) in at {
            for form in method.on_layer(module, loader.at(module, Some(param)), 1.0)? {
                forms.push((param, form));
            }
        }
        let prefix = method.in_attention(loader.at("", None))?;
        if let Some(prefix) = prefix.as_ref().filter(|prefix| prefix.is_read()) {
            let times = super::prompt::factor(base.model.as_ref()).unwrap_or(1.0);
            let rows = match method.encoder(loader.at("", None))? {
                Some(encoder) => From::Encoder(encoder),
                None => From::Tensor(prefix.tensor()),
            };
            let form = NewRows { rows, whose: Whose::Virtual { factor: times } };
            forms.push((base.model.outline().embedding, LayerForm::Lookup(Arc::new(form))));
        }
        self.prefix = prefix.or(self.prefix.take());
        let owner = self.held.extend(loader.finish(), factor);
        for (param, form) in &forms {
            self.by_param[param.0 as usize].push(form.clone());
        }
        Ok((owner, forms))
    }

    /// Attaches a term that only looks at what the layer with the weight `p` reads.
    pub(super) fn watch(&mut self, p: Param, term: impl Term<B> + 'static) {
        self.by_param[p.0 as usize].push(LayerForm::Term(Arc::new(term)));
    }

    /// Attaches tensors that stand in for parts of the base while they are in training.
    pub(super) fn take_learned(
        &mut self,
        loaded: Loaded<B>,
        vectors: Vec<(Param, TensorId)>,
        forms: Vec<(Param, LayerForm<B>)>,
    ) {
        self.held.extend(loaded, 1.0);
        self.vectors.extend(vectors.into_iter().map(|(param, id)| (param.0, id)));
        for (param, form) in forms {
            self.by_param[param.0 as usize].push(form);
        }
    }
}

/// The number of an adapter among those whose tensors are held, and what it does on layers.
type Placed<B> = (usize, Vec<(Param, LayerForm<B>)>);

/// Refuses `factor` for an adapter of `kind` whose effect cannot be multiplied.
fn check_factor(dir: &Path, kind: Kind, factor: f32) -> Result<()> {
    if factor == 1.0 || kind.has_strength() {
        return Ok(());
    }
    let message = format!(
        "expected a scale of 1, got `{factor}`: what {} does has no strength; attach it without a scale",
        kind.name()
    );
    Err(Error::new(ErrorCode::Config, format!("`{}`", dir.display()), message))
}

/// Refuses an adapter that cannot work with its effect multiplied by `factor`, or beside those `there`, which were attached
/// before it. Adapters of different methods work beside each other, in the order that `forms/mod.rs` states.
pub(super) fn check_beside(there: &[(&Path, Kind)], file: &AdapterFile, factor: f32) -> Result<()> {
    let (place, kind) = (format!("`{}`", file.dir.display()), file.method.kind());
    check_factor(&file.dir, kind, factor)?;
    if !kind.adds_up() && there.iter().any(|(_, other)| *other == kind) {
        let message = format!("expected one adapter with {}, got a second one; attach one of the two", kind.name());
        return Err(Error::new(ErrorCode::Config, place, message));
    }
    let virtual_tokens = |kind: Kind| kind.reads("num-virtual-tokens");
    if let Some((dir, other)) = there.iter().find(|(_, other)| virtual_tokens(kind) && virtual_tokens(*other)) {
        let message = format!(
            "expected one adapter with virtual tokens, got {} beside `{}` with {}; attach one of the two",
            kind.name(),
            dir.display(),
            other.name()
        );
        return Err(Error::new(ErrorCode::Config, place, message));
    }
    file.replaced.check_factor(&file.dir, factor)
}

fn shape_text(shape: Option<&Vec<usize>>) -> String {
    shape.map_or_else(|| "none".to_owned(), |shape| format!("`{shape:?}`"))
}

/// How many names a message has at most.
const MOST_NAMES: usize = 20;

/// The layers of `model` that `file` adapts, with the paths of their modules.
///
/// # Errors
/// The model has not all of them; those that are left over are listed.
pub(super) fn layers_of<'f>(model: &dyn Model, file: &'f AdapterFile) -> Result<Vec<(Param, &'f str)>> {
    let found: Vec<(Option<Param>, &str)> = file.modules().map(|module| (layer_at(model, module), module)).collect();
    let left: Vec<&str> = found.iter().filter(|(param, _)| param.is_none()).map(|(_, module)| *module).collect();
    match left[..] {
        [] => Ok(found.into_iter().filter_map(|(param, module)| Some((param?, module))).collect()),
        [one] => Err(foreign_module(model, &file.dir, "a linear layer", one)),
        ref many => {
            let shown = many[..many.len().min(MOST_NAMES)].join("`, `");
            let more = many.len().saturating_sub(MOST_NAMES);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let message = format!(
                "expected linear layers of this `{}` base, got {} modules that are none of {}: `{shown}`{more}; use the \
                 base that the adapter was trained on",
                model.config().model_type,
                many.len(),
                found.len(),
            );
            Err(Error::new(ErrorCode::AdapterMismatch, format!("`{}`", file.dir.display()), message))
        }
    }
}

/// Checks that the tensors of `module` fit its layer `[out, in]`.
pub(super) fn check_shapes(file: &AdapterFile, module: &str, layer: [usize; 2]) -> Result<()> {
    for (part, expected) in file.method.parts(module).iter().zip(file.method.shapes(module, layer)) {
        let got = file.tensors.get(&format!("{module}.{part}")).map(|t| &t.shape);
        if got != Some(&expected) {
            let got = shape_text(got);
            let message = format!(
                "expected `{part}` of shape `{expected:?}` for a layer `{layer:?}`, got {got}; use the base that the \
                 adapter was trained on"
            );
            let place = format!("`{}`: module `{module}`", file.dir.display());
            return Err(Error::new(ErrorCode::AdapterMismatch, place, message));
        }
    }
    check_places(file, module, layer)
}

/// Checks that places in the weight of `module` are in its layer `[out, in]`.
fn check_places(file: &AdapterFile, module: &str, [out, input]: [usize; 2]) -> Result<()> {
    let Some((part, flat)) = file.method.kind().places() else { return Ok(()) };
    let places = &file.tensors[&format!("{module}.{part}")].data;
    let (rows, cols) = if flat { (&places[..], &places[..0]) } else { places.split_at(places.len() / 2) };
    let beyond = |places: &[f32], end: usize| places.iter().find(|place| **place >= end as f32).copied();
    let rows = beyond(rows, if flat { out * input } else { out });
    if let Some(place) = rows.or_else(|| beyond(cols, input)) {
        let message = format!(
            "expected places in a layer `[{out}, {input}]`, got `{place}` in `{part}`; use the base that the adapter was \
             trained on"
        );
        let at = format!("`{}`: module `{module}`", file.dir.display());
        return Err(Error::new(ErrorCode::AdapterMismatch, at, message));
    }
    Ok(())
}

/// The error for a module that this base does not have.
pub(super) fn foreign_module(model: &dyn Model, dir: &Path, expected: &str, path: &str) -> Error {
    let message = format!(
        "expected {expected} of this `{}` base, got module `{path}`; use the base that the adapter was trained on",
        model.config().model_type
    );
    Error::new(ErrorCode::AdapterMismatch, format!("`{}`", dir.display()), message)
}
