//! The tensors of attached adapters on a device.

use super::made::{Input, Link};
use super::tensor::{TensorSpec, Tensors};
use super::weight::Weight;
use crate::adapter::Replaced;
use crate::base::Base;
use crate::error::Result;
use pocketlora_kernels::{Backend, WorkType};
use pocketlora_models::Param;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The number of an attached tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorId(pub(super) usize);

impl TensorId {
    /// Its place among all attached tensors.
    #[must_use]
    pub fn number(self) -> usize {
        self.0
    }

    /// The number of none.
    pub(super) fn none() -> Self {
        Self(usize::MAX)
    }
}

/// What a tensor of an attached adapter is to training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// One of the adapter's file, which an optimizer moves.
    Own,
    /// Made of the file's tensors, see [`super::made`]: it has a gradient, which becomes one of theirs.
    Made,
    /// It stays as it is.
    Fixed,
}

/// A tensor of an attached adapter.
struct Attached<B: Backend> {
    spec: TensorSpec,
    part: Part,
    /// Number of the adapter whose it is.
    owner: usize,
    values: AdapterTensor<B>,
}

enum AdapterTensor<B: Backend> {
    /// What something is multiplied with.
    Matrix(B::Matrix),
    /// Anything else, in f32.
    Buffer(B::Buffer),
}

/// The tensors of all attached adapters, in the order in which they were attached: those of one adapter in the order of
/// the base's parameters.
pub struct Held<B: Backend> {
    /// Sets of the same adapters with other strengths share them.
    tensors: Arc<Vec<Attached<B>>>,
    /// What the effect of each adapter is multiplied by.
    strengths: Vec<f32>,
    /// How made tensors follow from others, where those are in training.
    links: Vec<Link>,
}

impl<B: Backend> Default for Held<B> {
    fn default() -> Self {
        Self { tensors: Arc::default(), strengths: Vec::new(), links: Vec::new() }
    }
}

impl<B: Backend> Held<B> {
    /// What the effect of the adapter is multiplied by whose tensor this is.
    pub fn strength(&self, id: TensorId) -> f32 {
        self.strengths[self.tensors[id.0].owner]
    }

    /// The same tensors with the effect of each adapter multiplied by what `strengths` says. It is not for training.
    pub(super) fn with_strengths(&self, strengths: Vec<f32>) -> Self {
        Self { tensors: Arc::clone(&self.tensors), strengths, links: Vec::new() }
    }

    /// What the effect of each adapter is multiplied by, in the order in which they were attached.
    pub(super) fn strengths(&self) -> &[f32] {
        &self.strengths
    }

    fn own(&mut self) -> &mut Vec<Attached<B>> {
        Arc::get_mut(&mut self.tensors).expect("what is in training, or still grows, is shared with no other set")
    }

    /// A tensor that was loaded as a matrix.
    pub fn matrix(&self, id: TensorId) -> &B::Matrix {
        match &self.tensors[id.0].values {
            AdapterTensor::Matrix(matrix) => matrix,
            AdapterTensor::Buffer(_) => unreachable!("whoever loads a tensor knows what it is"),
        }
    }

    /// A tensor that was loaded as plain values.
    pub fn buffer(&self, id: TensorId) -> &B::Buffer {
        match &self.tensors[id.0].values {
            AdapterTensor::Buffer(buffer) => buffer,
            AdapterTensor::Matrix(_) => unreachable!("whoever loads a tensor knows what it is"),
        }
    }

    /// Those that an optimizer moves, with the names and shapes that they have in the adapter's file.
    pub fn specs(&self) -> impl Iterator<Item = (TensorId, &TensorSpec)> {
        let all = self.tensors.iter().enumerate().filter(|(_, t)| t.part == Part::Own);
        all.map(|(i, t)| (TensorId(i), &t.spec))
    }

    /// Those of the adapters' files, or of what training has beside them, that stay as they are.
    pub fn fixed(&self) -> impl Iterator<Item = (TensorId, &TensorSpec)> {
        let all = self.tensors.iter().enumerate().filter(|(_, t)| t.part == Part::Fixed && !t.spec.name.is_empty());
        all.map(|(i, t)| (TensorId(i), &t.spec))
    }

    /// What each tensor is to training, and how many values it has.
    pub fn parts(&self) -> impl Iterator<Item = (Part, usize)> {
        self.tensors.iter().map(|t| (t.part, t.spec.values()))
    }

    /// How made tensors follow from others, where those are in training.
    pub(super) fn links(&self) -> &[Link] {
        &self.links
    }

    /// Lends the values of a tensor that was loaded as [`WorkType::F32`]: they are the master itself.
    pub fn update(&mut self, backend: &B, id: TensorId, work: &mut dyn FnMut(&mut B::Buffer)) {
        match &mut self.own()[id.0].values {
            AdapterTensor::Matrix(matrix) => backend.with_values(matrix, work),
            AdapterTensor::Buffer(buffer) => work(buffer),
        }
    }

    /// Gives those of the tensors, trained or not, that `values` has by their names these values. They were loaded as
    /// [`WorkType::F32`]; what is made of them has to be made anew.
    pub(crate) fn put(&mut self, backend: &B, values: &Tensors) {
        for (i, name) in self.tensors.iter().map(|t| t.spec.name.clone()).enumerate().collect::<Vec<_>>() {
            let Some(tensor) = values.get(&name) else { continue };
            self.update(backend, TensorId(i), &mut |buffer| backend.write(buffer, &tensor.data));
        }
        for input in self.links.iter_mut().flat_map(|link| &mut link.own) {
            if let Input::Host(name, host) = input
                && let Some(tensor) = values.get(name)
            {
                host.clone_from(&tensor.data);
            }
        }
    }

    /// Copies the values of such a tensor out.
    ///
    /// # Errors
    /// Device lost.
    pub fn read(&self, backend: &B, id: TensorId) -> Result<Vec<f32>> {
        let Attached { spec, values, .. } = &self.tensors[id.0];
        let mut out = vec![0.0; spec.values()];
        match values {
            AdapterTensor::Matrix(matrix) => backend.read_matrix(matrix, &mut out)?,
            AdapterTensor::Buffer(buffer) => backend.read(buffer, &mut out)?,
        }
        Ok(out)
    }

    /// Name and shape of a tensor.
    pub fn spec(&self, id: TensorId) -> &TensorSpec {
        &self.tensors[id.0].spec
    }

    /// Whether a tensor is in training, or made of such.
    pub(super) fn learns(&self, id: TensorId) -> bool {
        self.tensors[id.0].part != Part::Fixed
    }

    /// Those from number `first` on stay as they are. Returns their names.
    pub(super) fn fix(&mut self, first: usize) -> Vec<(String, TensorId)> {
        self.own()[first..].iter_mut().for_each(|t| t.part = Part::Fixed);
        (first..self.tensors.len()).map(|i| (self.tensors[i].spec.name.clone(), TensorId(i))).collect()
    }

    pub(super) fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Takes over what a loader has loaded for one adapter behind these; its effect is multiplied by `strength`. Returns the
    /// adapter's number.
    pub(super) fn extend(&mut self, more: Loaded<B>, strength: f32) -> usize {
        let owner = self.strengths.len();
        self.strengths.push(strength);
        self.own().extend(more.tensors.into_iter().map(|tensor| Attached { owner, ..tensor }));
        self.links.extend(more.links);
        owner
    }
}

/// Where an adapter's values come from.
#[derive(Clone, Copy)]
pub(crate) enum Values<'a> {
    /// These.
    Of(&'a Tensors),
    /// All are zeros, to count what an adapter takes.
    Zeros(&'a [TensorSpec]),
}

/// Tensors that were loaded, before they are attached.
pub(super) struct Loaded<B: Backend> {
    tensors: Vec<Attached<B>>,
    links: Vec<Link>,
}

/// Puts an adapter's tensors on a device, for a method that builds what works with them.
pub(crate) struct Loader<'a, B: Backend> {
    base: &'a Base<B>,
    replaced: &'a Replaced<B>,
    values: Values<'a>,
    dtype: WorkType,
    /// Its tensors are to be trained.
    trains: bool,
    /// Tensors that are attached already.
    before: usize,
    loaded: Loaded<B>,
    /// Fixed tensors that several modules read, by name and shape.
    shared: BTreeMap<(String, [usize; 2]), TensorId>,
    /// What stands before the names of parts: the module's path.
    module: String,
    /// The module's layer.
    layer: Option<Param>,
}

impl<'a, B: Backend> Loader<'a, B> {
    pub fn new(
        base: &'a Base<B>,
        replaced: &'a Replaced<B>,
        values: Values<'a>,
        dtype: WorkType,
        trains: bool,
        held: &Held<B>,
    ) -> Self {
        let loaded = Loaded { tensors: Vec::new(), links: Vec::new() };
        let (before, shared) = (held.len(), BTreeMap::new());
        Self { base, replaced, values, dtype, trains, before, loaded, shared, module: String::new(), layer: None }
    }

    /// Loads the parts of the module at the path `module`, whose layer is `layer`, from now on.
    pub fn at(&mut self, module: &str, layer: Option<Param>) -> &mut Self {
        module.clone_into(&mut self.module);
        self.layer = layer;
        self
    }

    /// Whether the tensors are to be trained.
    pub fn trains(&self) -> bool {
        self.trains
    }

    /// The module's layer, and its weight.
    pub fn weight(&self) -> (Param, Weight<'a, B>) {
        let layer = self.layer.expect("asked of a module");
        let counts = matches!(self.values, Values::Zeros(_));
        (layer, Weight { base: self.base, replaced: self.replaced, layer, counts })
    }

    /// Values of the part `part` of the module, or of a tensor that belongs to no module; none where memory is counted.
    pub fn host(&self, part: &str) -> Option<&'a [f32]> {
        let Values::Of(tensors) = self.values else { return None };
        let own = tensors.get(&format!("{}.{part}", self.module)).or_else(|| tensors.get(part));
        Some(&own.expect("that all are there was checked before").data)
    }

    /// Columns of the tensor `name`, which belongs to no module.
    pub fn columns_of(&self, name: &str) -> usize {
        let Values::Of(tensors) = self.values else { return 1 };
        tensors[name].shape.last().copied().unwrap_or(1)
    }

    /// The part `part` of the module, as a matrix of work.
    ///
    /// # Errors
    /// Out of memory.
    pub fn matrix(&mut self, part: &str) -> Result<TensorId> {
        let spec = self.spec(part);
        let data = self.data(&spec.name);
        self.put_matrix(spec, Part::Own, data)
    }

    /// The part `part` of the module, as plain values in f32.
    ///
    /// # Errors
    /// Out of memory.
    pub fn buffer(&mut self, part: &str) -> Result<TensorId> {
        let spec = self.spec(part);
        let data = self.data(&spec.name);
        self.put_buffer(spec, Part::Own, data)
    }

    /// As [`Loader::matrix`] or, where it is no `matrix`, [`Loader::buffer`], of what is not trained.
    ///
    /// # Errors
    /// Out of memory.
    pub fn fixed(&mut self, part: &str, matrix: bool) -> Result<TensorId> {
        let spec = self.spec(part);
        let data = self.data(&spec.name);
        if matrix { self.put_matrix(spec, Part::Fixed, data) } else { self.put_buffer(spec, Part::Fixed, data) }
    }

    /// What is made of the file's tensors, a `matrix` or plain values: `values` of `shape`, none to count.
    ///
    /// # Errors
    /// Out of memory.
    pub fn made(&mut self, shape: &[usize], matrix: bool, values: Option<&[f32]>) -> Result<TensorId> {
        let part = if self.trains { Part::Made } else { Part::Fixed };
        let spec = TensorSpec { name: String::new(), shape: shape.to_vec() };
        if matrix { self.put_matrix(spec, part, values) } else { self.put_buffer(spec, part, values) }
    }

    /// A matrix `name` of `shape` that stays as it is and that several modules may read: it is loaded once.
    ///
    /// # Errors
    /// Out of memory.
    pub fn shared(&mut self, name: &str, shape: [usize; 2], values: &dyn Fn() -> Vec<f32>) -> Result<TensorId> {
        let key = (name.to_owned(), shape);
        if let Some(id) = self.shared.get(&key) {
            return Ok(*id);
        }
        let made = matches!(self.values, Values::Of(_)).then(values);
        let spec = TensorSpec { name: String::new(), shape: shape.to_vec() };
        let id = self.put_matrix(spec, Part::Fixed, made.as_deref())?;
        self.shared.insert(key, id);
        Ok(id)
    }

    /// Notes how made tensors follow from others.
    pub fn link(&mut self, link: Link) {
        self.loaded.links.push(link);
    }

    fn put_matrix(&mut self, spec: TensorSpec, part: Part, values: Option<&[f32]>) -> Result<TensorId> {
        let backend = &self.base.backend;
        let [rows, cols] = spec.shape[..] else { unreachable!("shapes were checked before") };
        let mut matrix = backend.work_matrix(rows, cols, self.dtype)?;
        if let Some(data) = values {
            if self.dtype == WorkType::F32 {
                backend.with_values(&mut matrix, &mut |values| backend.write(values, data));
            } else {
                let mut master = backend.buffer(data.len())?;
                backend.write(&mut master, data);
                backend.set_matrix(&mut matrix, &master);
            }
        }
        Ok(self.push(spec, part, AdapterTensor::Matrix(matrix)))
    }

    fn put_buffer(&mut self, spec: TensorSpec, part: Part, values: Option<&[f32]>) -> Result<TensorId> {
        let mut buffer = self.base.backend.buffer(spec.values())?;
        values.into_iter().for_each(|values| self.base.backend.write(&mut buffer, values));
        Ok(self.push(spec, part, AdapterTensor::Buffer(buffer)))
    }

    fn data(&self, name: &str) -> Option<&'a [f32]> {
        let Values::Of(tensors) = self.values else { return None };
        Some(&tensors[name].data)
    }

    /// The name in the file of the module's part `part`, or of a tensor that belongs to no module.
    pub fn name_of(&self, part: &str) -> String {
        if self.module.is_empty() { part.to_owned() } else { format!("{}.{part}", self.module) }
    }

    fn spec(&self, part: &str) -> TensorSpec {
        let name = self.name_of(part);
        let shape = match self.values {
            Values::Of(tensors) => tensors.get(&name).map(|t| t.shape.clone()),
            Values::Zeros(specs) => specs.iter().find(|spec| spec.name == name).map(|spec| spec.shape.clone()),
        };
        TensorSpec { name, shape: shape.expect("that all are there was checked before") }
    }

    fn push(&mut self, spec: TensorSpec, part: Part, values: AdapterTensor<B>) -> TensorId {
        self.loaded.tensors.push(Attached { spec, part, owner: 0, values });
        TensorId(self.before + self.loaded.tensors.len() - 1)
    }

    pub(super) fn finish(self) -> Loaded<B> {
        self.loaded
    }
}
