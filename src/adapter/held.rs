//! The tensors of attached adapters on a device.

use super::tensor::{TensorSpec, Tensors};
use crate::error::Result;
use pocketlora_kernels::{Backend, WorkType};

/// The number of an attached tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorId(pub(super) usize);

impl TensorId {
    /// The number of none.
    pub(super) fn none() -> Self {
        Self(usize::MAX)
    }
}

/// A tensor of an attached adapter.
struct Attached<B: Backend> {
    spec: TensorSpec,
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
pub struct Held<B: Backend>(Vec<Attached<B>>);

impl<B: Backend> Default for Held<B> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<B: Backend> Held<B> {
    /// A tensor that was loaded as a matrix.
    pub fn matrix(&self, id: TensorId) -> &B::Matrix {
        match &self.0[id.0].values {
            AdapterTensor::Matrix(matrix) => matrix,
            AdapterTensor::Buffer(_) => unreachable!("whoever loads a tensor knows what it is"),
        }
    }

    /// A tensor that was loaded as plain values.
    pub fn buffer(&self, id: TensorId) -> &B::Buffer {
        match &self.0[id.0].values {
            AdapterTensor::Buffer(buffer) => buffer,
            AdapterTensor::Matrix(_) => unreachable!("whoever loads a tensor knows what it is"),
        }
    }

    /// All, with their names and shapes.
    pub fn specs(&self) -> impl Iterator<Item = (TensorId, &TensorSpec)> {
        self.0.iter().enumerate().map(|(i, t)| (TensorId(i), &t.spec))
    }

    /// Lends the values of a tensor that was loaded as [`WorkType::F32`]: they are the master itself.
    pub fn update(&mut self, backend: &B, id: TensorId, work: &mut dyn FnMut(&mut B::Buffer)) {
        match &mut self.0[id.0].values {
            AdapterTensor::Matrix(matrix) => backend.with_values(matrix, work),
            AdapterTensor::Buffer(buffer) => work(buffer),
        }
    }

    /// Copies the values of such a tensor out.
    ///
    /// # Errors
    /// Device lost.
    pub fn read(&self, backend: &B, id: TensorId) -> Result<Vec<f32>> {
        let Attached { spec, values } = &self.0[id.0];
        let mut out = vec![0.0; spec.values()];
        match values {
            AdapterTensor::Matrix(matrix) => backend.read_matrix(matrix, &mut out)?,
            AdapterTensor::Buffer(buffer) => backend.read(buffer, &mut out)?,
        }
        Ok(out)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Takes over what `loader` has loaded behind these.
    pub(super) fn extend(&mut self, more: Loaded<B>) {
        self.0.extend(more.0);
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
pub(super) struct Loaded<B: Backend>(Vec<Attached<B>>);

/// Puts an adapter's tensors on a device, for a method that builds what works with them.
pub(crate) struct Loader<'a, B: Backend> {
    backend: &'a B,
    values: Values<'a>,
    dtype: WorkType,
    /// Tensors that are attached already.
    before: usize,
    loaded: Vec<Attached<B>>,
    /// What stands before the names of parts: the module's path.
    module: String,
}

impl<'a, B: Backend> Loader<'a, B> {
    pub fn new(backend: &'a B, values: Values<'a>, dtype: WorkType, held: &Held<B>) -> Self {
        Self { backend, values, dtype, before: held.len(), loaded: Vec::new(), module: String::new() }
    }

    /// Loads the parts of the module at the path `module` from now on.
    pub fn at(&mut self, module: &str) -> &mut Self {
        module.clone_into(&mut self.module);
        self
    }

    /// The part `part` of the module, as a matrix of work.
    ///
    /// # Errors
    /// Out of memory.
    pub fn matrix(&mut self, part: &str) -> Result<TensorId> {
        let (backend, spec) = (self.backend, self.spec(part));
        let [rows, cols] = spec.shape[..] else { unreachable!("shapes were checked before") };
        let mut matrix = backend.work_matrix(rows, cols, self.dtype)?;
        if let Values::Of(tensors) = self.values {
            let data = &tensors[&spec.name].data;
            if self.dtype == WorkType::F32 {
                backend.with_values(&mut matrix, &mut |values| backend.write(values, data));
            } else {
                let mut master = backend.buffer(data.len())?;
                backend.write(&mut master, data);
                backend.set_matrix(&mut matrix, &master);
            }
        }
        Ok(self.push(spec, AdapterTensor::Matrix(matrix)))
    }

    /// The part `part` of the module, as plain values in f32.
    ///
    /// # Errors
    /// Out of memory.
    pub fn buffer(&mut self, part: &str) -> Result<TensorId> {
        let spec = self.spec(part);
        let mut buffer = self.backend.buffer(spec.values())?;
        if let Values::Of(tensors) = self.values {
            self.backend.write(&mut buffer, &tensors[&spec.name].data);
        }
        Ok(self.push(spec, AdapterTensor::Buffer(buffer)))
    }

    fn spec(&self, part: &str) -> TensorSpec {
        let name = if self.module.is_empty() { part.to_owned() } else { format!("{}.{part}", self.module) };
        let shape = match self.values {
            Values::Of(tensors) => tensors.get(&name).map(|t| t.shape.clone()),
            Values::Zeros(specs) => specs.iter().find(|spec| spec.name == name).map(|spec| spec.shape.clone()),
        };
        TensorSpec { name, shape: shape.expect("that all are there was checked before") }
    }

    fn push(&mut self, spec: TensorSpec, values: AdapterTensor<B>) -> TensorId {
        self.loaded.push(Attached { spec, values });
        TensorId(self.before + self.loaded.len() - 1)
    }

    pub(super) fn finish(self) -> Loaded<B> {
        Loaded(self.loaded)
    }
}
