//! Weights that come with an adapter and stand in for the base's while it is attached: an embedding and a head of more
//! rows, trained copies of modules, biases, single rows of an embedding. Whole ones are mapped from the adapter's file, as
//! the base's are from its own.

use super::attach::foreign_module;
use super::forms::{Context, Gradients, Term};
use super::method::{EMBEDDING, HEAD, layer_at};
use super::{AdapterFile, Rows, WholeTensor};
use crate::base::{Base, Pool};
use crate::error::{Error, ErrorCode, Result};
use crate::format::widen;
use bytes::Bytes;
use pocketlora_kernels::{Arithmetic, Backend, Call, FloatType, MatrixData, MatrixSource};
use pocketlora_models::{Model, Param, ParamSpec, Role};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The weights of all attached adapters.
pub struct Replaced<B: Backend> {
    /// The embedding's, for looking tokens up.
    table: Option<Arc<B::Matrix>>,
    /// Those that something is multiplied with. A tied head is the embedding's parameter here.
    factors: BTreeMap<u32, Arc<B::Matrix>>,
    vectors: BTreeMap<u32, Arc<B::Buffer>>,
    /// Single rows of the embedding or of the head.
    rows: Vec<NewRows<B>>,
    /// What was brought by whom.
    owners: BTreeMap<String, (PathBuf, Bytes)>,
}

impl<B: Backend> Default for Replaced<B> {
    fn default() -> Self {
        Self {
            table: None,
            factors: BTreeMap::new(),
            vectors: BTreeMap::new(),
            rows: Vec::new(),
            owners: BTreeMap::new(),
        }
    }
}

impl<B: Backend> Clone for Replaced<B> {
    fn clone(&self) -> Self {
        let Self { table, factors, vectors, rows, owners } = self;
        let (table, factors, vectors) = (table.clone(), factors.clone(), vectors.clone());
        Self { table, factors, vectors, rows: rows.clone(), owners: owners.clone() }
    }
}

impl<B: Backend> Replaced<B> {
    /// Whether all weights are the base's.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.owners.is_empty()
    }

    /// What tokens are looked up in: `p` of `base`, unless there is another.
    pub fn table<'a>(&'a self, base: &'a Base<B>, p: Param) -> &'a B::Matrix {
        self.table.as_deref().unwrap_or_else(|| base.matrix(p))
    }

    /// Whether there is another embedding than the base's.
    #[must_use]
    pub fn has_table(&self) -> bool {
        self.table.is_some()
    }

    /// What products in `arithmetic` read for `p`: the matrix of `base`, unless there is another.
    pub fn factor<'a>(&'a self, base: &'a Base<B>, p: Param, arithmetic: Arithmetic) -> &'a B::Matrix {
        self.factors.get(&p.0).map_or_else(|| base.factor(p, arithmetic), Arc::as_ref)
    }

    /// The shape `[out, in]` of what `p` is multiplied with.
    pub(super) fn shape(&self, base: &Base<B>, p: Param) -> [usize; 2] {
        base.backend.shape(self.factor(base, p, Arithmetic::Exact)).into()
    }

    /// The vector `p` of `base`, unless there is another.
    pub fn vector<'a>(&'a self, base: &'a Base<B>, p: Param) -> &'a B::Buffer {
        self.vectors.get(&p.0).map_or_else(|| base.vector(p), Arc::as_ref)
    }

    /// How many tokens `base` knows with these: rows of its embedding and of its head.
    pub fn vocabulary(&self, base: &Base<B>) -> usize {
        self.shape(base, base.model.head_param())[0]
    }

    /// Checks that `ids` are rows of the embedding; tokenizers and checkpoints do disagree in the wild.
    pub(crate) fn check_ids(&self, base: &Base<B>, ids: &[u32]) -> Result<()> {
        let vocab = self.vocabulary(base);
        match ids.iter().position(|&id| id as usize >= vocab) {
            None => Ok(()),
            Some(at) => Err(Error::new(
                ErrorCode::Data,
                format!("token {at}"),
                format!(
                    "expected an id below the vocabulary's {vocab}, got `{}`; use the tokenizer of this model",
                    ids[at]
                ),
            )),
        }
    }

    /// Bytes of mapped files that it holds on to.
    #[must_use]
    pub fn mapped_bytes(&self) -> u64 {
        self.owners.values().map(|(_, bytes)| bytes.len() as u64).sum()
    }

    /// These and the ones of `file`.
    pub(crate) fn with(&self, base: &Base<B>, file: &AdapterFile) -> Result<Self> {
        let place = || format!("`{}`", file.dir.display());
        let mut all = self.clone();
        if file.replaced.is_empty() {
            return Ok(all);
        }
        for whole in &file.replaced.whole {
            all.take(base, file, whole)?;
        }
        all.tie(base, file)?;
        let params = base.model.params().iter();
        let embedding = params.zip(0..).find(|(p, _)| p.role == Role::Embedding).map(|(_, i)| Param(i));
        let head = base.model.head_param();
        let (table, _) = base.backend.shape(all.table(base, embedding.unwrap_or(head)));
        let head = all.vocabulary(base);
        if table != head {
            let message = format!(
                "expected an embedding and a head of the same vocabulary, got {table} and {head} rows; save the adapter \
                 again with both of them (`save_embedding_layers=True`)"
            );
            return Err(Error::new(ErrorCode::AdapterMismatch, place(), message));
        }
        for rows in &file.replaced.rows {
            all.add_rows(base, file, rows)?;
        }
        Ok(all)
    }

    /// Puts single rows in their places.
    fn add_rows(&mut self, base: &Base<B>, file: &AdapterFile, new: &Rows) -> Result<()> {
        let key = format!("rows of {}", new.module);
        let bytes = Bytes::from(new.values.data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>());
        match self.owners.get(&key) {
            Some((_, there)) if *there == bytes => return Ok(()),
            Some((other, _)) => return Err(brought_twice(file, &key, other)),
            None => {}
        }
        let model = base.model.as_ref();
        let param = layer_at(model, &new.module);
        let param = param.filter(|_| matches!(new.module.as_str(), EMBEDDING | HEAD));
        let param = param.ok_or_else(|| foreign_module(model, &file.dir, "an embedding", &new.module))?;
        let in_table = new.module == EMBEDDING;
        let matrix = if in_table { self.table(base, param) } else { self.factor(base, param, Arithmetic::Exact) };
        let (backend, (vocabulary, width)) = (&base.backend, base.backend.shape(matrix));
        new.check(&file.dir, [vocabulary, width])?;
        // What is added to the rows that are there: lookups and products stay those of the base.
        let mut old = backend.buffer(new.ids.len() * width)?;
        backend.run(Call::Embed { table: matrix, ids: &new.ids, y: &mut old })?;
        let mut values = vec![0.0; new.values.data.len()];
        backend.read(&old, &mut values)?;
        values.iter_mut().zip(&new.values.data).for_each(|(old, new)| *old = new - *old);
        let data = MatrixData::Dense(FloatType::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect());
        let difference = Arc::new(backend.matrix(MatrixSource { rows: new.ids.len(), cols: width, data })?);
        self.rows.push(NewRows { ids: new.ids.clone().into(), difference, in_table });
        self.owners.insert(key, (file.dir.clone(), bytes));
        Ok(())
    }

    /// Adds to `y` `[T, C]`, which was looked up for `ids`, what new rows are beside the old ones.
    pub(crate) fn look_up(&self, backend: &B, pool: &mut Pool<B>, ids: &[u32], y: &mut B::Buffer) -> Result<()> {
        for new in self.rows.iter().filter(|new| new.in_table) {
            let place = |(row, id): (u32, &u32)| Some((row, new.ids.iter().position(|new| new == id)? as u32));
            let (rows, places): (Vec<u32>, Vec<u32>) = (0..).zip(ids).filter_map(place).unzip();
            if rows.is_empty() {
                continue;
            }
            let mut term = pool.take(backend, rows.len() * backend.shape(&new.difference).1)?;
            backend.run(Call::Embed { table: &new.difference, ids: &places, y: &mut term })?;
            backend.run(Call::ScatterAddRows { x: &term, rows: &rows, y })?;
            pool.put(backend, term);
        }
        Ok(())
    }

    /// Terms on the head that the new rows of `file` are, which is among these: those of the head itself, and those of an
    /// embedding that the head is.
    pub(super) fn on_head(&self, base: &Base<B>, file: &AdapterFile) -> Vec<(Param, RowsTerm<B>)> {
        let own = file.replaced.rows.len().min(self.rows.len());
        let seen = |new: &&NewRows<B>| !new.in_table || base.model.config().tied_head;
        let term = |new: &NewRows<B>| RowsTerm { ids: new.ids.clone(), difference: Arc::clone(&new.difference) };
        let new = self.rows[self.rows.len() - own..].iter().filter(seen);
        new.map(|new| (base.model.head_param(), term(new))).collect()
    }

    /// Puts one weight in its place.
    fn take(&mut self, base: &Base<B>, file: &AdapterFile, whole: &WholeTensor) -> Result<()> {
        let (at, float) = weight_of(base.model.as_ref(), file, whole)?;
        let (spec, tensor) = (&base.model.params()[at], &whole.tensor);
        let name = whole.name();
        let key = if whole.copy { format!("{name} (copy)") } else { name.clone() };
        if let Some((other, bytes)) = self.owners.get(&key) {
            if *bytes == tensor.bytes {
                return Ok(());
            }
            return Err(brought_twice(file, &name, other));
        }
        self.owners.insert(key, (file.dir.clone(), tensor.bytes.clone()));
        if spec.role == Role::Vector {
            let mut values = vec![0.0; spec.shape.iter().product()];
            widen(float, &tensor.bytes, &mut values);
            let mut buffer = base.backend.buffer(values.len())?;
            base.backend.write(&mut buffer, &values);
            self.vectors.insert(at as u32, Arc::new(buffer));
            return Ok(());
        }
        let (rows, cols) = (tensor.shape[0], tensor.shape[1]);
        let source = MatrixSource { rows, cols, data: MatrixData::Dense(float, tensor.bytes.clone()) };
        let matrix = Arc::new(base.backend.matrix(source)?);
        if spec.role == Role::Embedding && name == spec.name {
            self.table = Some(matrix);
        } else {
            self.factors.insert(at as u32, matrix);
        }
        Ok(())
    }

    /// What a tied head becomes: PEFT loads a plain embedding into the base, where the head sees it. Of a trained copy it
    /// does not know, unless the adapter says so.
    fn tie(&mut self, base: &Base<B>, file: &AdapterFile) -> Result<()> {
        let Some(seen) = file.replaced.seen_by_head(base.model.as_ref()) else { return Ok(()) };
        let head = base.model.head_param();
        let Some(float) = seen.tensor.float_type() else { return Ok(()) };
        let (rows, cols) = (seen.tensor.shape[0], seen.tensor.shape[1]);
        let source = MatrixSource { rows, cols, data: MatrixData::Dense(float, seen.tensor.bytes.clone()) };
        self.factors.insert(head.0, Arc::new(base.backend.matrix(source)?));
        Ok(())
    }
}

/// Rows that stand in for single ones of an embedding or a head.
struct NewRows<B: Backend> {
    ids: Arc<[u32]>,
    /// What they are beside the old ones, `[n, C]`.
    difference: Arc<B::Matrix>,
    /// They are looked up, or else multiplied with only.
    in_table: bool,
}

impl<B: Backend> Clone for NewRows<B> {
    fn clone(&self) -> Self {
        Self { ids: Arc::clone(&self.ids), difference: Arc::clone(&self.difference), in_table: self.in_table }
    }
}

/// New rows of a head: `y[:, ids] += x Dᵀ` with `D` `[n, C]`, what they are beside the old ones.
pub(super) struct RowsTerm<B: Backend> {
    ids: Arc<[u32]>,
    difference: Arc<B::Matrix>,
}

impl<B: Backend> RowsTerm<B> {
    /// Where the values of the columns are in `y` `[T, V]`, row after row.
    fn places(&self, tokens: usize, y: usize) -> Vec<u32> {
        let columns = y / tokens.max(1);
        (0..tokens).flat_map(|t| self.ids.iter().map(move |id| (t * columns) as u32 + id)).collect()
    }
}

impl<B: Backend> Term<B> for RowsTerm<B> {
    fn apply(&self, cx: &mut Context<'_, B>, x: &B::Buffer, y: &mut B::Buffer) -> Result<()> {
        let backend = cx.backend;
        let (n, width) = backend.shape(&self.difference);
        let tokens = backend.len(x) / width;
        let mut h = cx.pool.take(backend, tokens * n)?;
        let w = &*self.difference;
        backend.run(Call::Matmul { arithmetic: cx.arithmetic, w, x, y: &mut h, accumulate: false })?;
        let places = self.places(tokens, backend.len(y));
        backend.run(Call::ScatterAddRows { x: &h, rows: &places, y })?;
        cx.pool.put(backend, h);
        Ok(())
    }

    fn backward(
        &self,
        cx: &mut Context<'_, B>,
        x: &B::Buffer,
        dy: &B::Buffer,
        _grads: &mut Gradients<B>,
    ) -> Result<B::Buffer> {
        let backend = cx.backend;
        let (n, width) = backend.shape(&self.difference);
        let tokens = backend.len(x) / width;
        let mut dh = cx.pool.take(backend, tokens * n)?;
        backend.run(Call::GatherRows { x: dy, rows: &self.places(tokens, backend.len(dy)), y: &mut dh })?;
        Ok(dh)
    }

    fn backward_x(&self, cx: &mut Context<'_, B>, dh: &B::Buffer, dx: &mut B::Buffer) -> Result<()> {
        let terms = [(&*self.difference, dh)];
        Ok(cx.backend.run(Call::MatmulVjpX { arithmetic: cx.arithmetic, terms: &terms, dx, accumulate: true })?)
    }
}

/// The parameter of `model` that `whole`, which the adapter `file` brings, stands in for, and the type of its values. The
/// embedding or head of another vocabulary fits as well.
///
/// # Errors
/// The model has no such parameter, or one of another shape.
pub(super) fn weight_of(model: &dyn Model, file: &AdapterFile, whole: &WholeTensor) -> Result<(usize, FloatType)> {
    let (name, tensor) = (whole.name(), &whole.tensor);
    let is_it = |p: &ParamSpec| match p.role {
        Role::Embedding => name == p.name || name == "lm_head.weight" && model.config().tied_head,
        _ => name == p.name,
    };
    let at = model.params().iter().position(is_it);
    let at = at.ok_or_else(|| foreign_module(model, &file.dir, "a part", &whole.module))?;
    let spec = &model.params()[at];
    let vocabulary = matches!(spec.role, Role::Embedding | Role::Head);
    let fits = match (&spec.shape[..], &tensor.shape[..]) {
        // The vocabulary may have grown.
        (&[_, cols], &[rows, got]) if vocabulary => rows > 0 && cols == got,
        (expected, got) => expected == got,
    };
    tensor.float_type().filter(|_| fits).map(|float| (at, float)).ok_or_else(|| {
        let message = format!(
            "expected F32, F16 or BF16 of shape `{:?}` as in the base, got {}; use the base that the adapter was \
             trained on",
            spec.shape,
            tensor.describe()
        );
        let place = format!("`{}`: tensor `{name}`", file.dir.display());
        Error::new(ErrorCode::AdapterMismatch, place, message)
    })
}

/// The error for two adapters with different weights for the same place.
pub(super) fn brought_twice(file: &AdapterFile, name: &str, other: &Path) -> Error {
    let message =
        format!("`{}` brings another one in place of the base's; attach only one of the two", other.display());
    Error::new(ErrorCode::AdapterMismatch, format!("`{}`: tensor `{name}`", file.dir.display()), message)
}
