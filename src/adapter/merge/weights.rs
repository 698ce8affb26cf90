//! The weights of a merged model: where each comes from, and what adapters change in it.

use super::{HEAD, Merged, VOCABULARY};
use crate::adapter::AdapterFile;
use crate::adapter::fold::Fold;
use crate::adapter::peft::{Rows, WholeTensor};
use crate::adapter::replaced::{brought_twice, weight_of};
use crate::error::{Error, ErrorCode, Result};
use crate::format::safetensors::Tensor;
use crate::format::{Source, TensorMeta, widen};
use pocketlora_kernels::FloatType;
use pocketlora_models::Role;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

/// Where a weight's values are before adapters change them.
#[derive(Clone)]
pub(super) enum Origin {
    /// Number of a weight of the base.
    Base(usize),
    /// A weight that an adapter brings.
    Brought(FloatType, Tensor),
}

/// One weight.
pub(super) struct Weight {
    pub origin: Origin,
    /// Rows that stand in for single ones.
    rows: Arc<BTreeMap<usize, Vec<f32>>>,
    /// What layers' adapters do, one after another.
    folds: Vec<Arc<dyn Fold>>,
}

impl Weight {
    pub fn new(origin: Origin) -> Self {
        Self { origin, rows: Arc::default(), folds: Vec::new() }
    }

    /// Takes what one more layer's adapter does: terms of the product come before what changes its input or output, as
    /// they do where adapters are attached.
    pub fn push(&mut self, fold: Arc<dyn Fold>) {
        let terms = self.folds.iter().take_while(|fold| fold.is_term()).count();
        self.folds.insert(if fold.is_term() { terms } else { self.folds.len() }, fold);
    }

    /// The same without what layers' adapters do.
    pub fn without_folds(&self) -> Self {
        Self { origin: self.origin.clone(), rows: Arc::clone(&self.rows), folds: Vec::new() }
    }

    /// The number of what it is made of in the base, if that is a weight of it.
    pub fn of_base(&self) -> Option<usize> {
        match self.origin {
            Origin::Base(at) => Some(at),
            _ => None,
        }
    }

    /// Its number in the base, if it is that one.
    pub fn unchanged(&self) -> Option<usize> {
        match self.origin {
            Origin::Base(at) if self.rows.is_empty() && self.folds.is_empty() => Some(at),
            _ => None,
        }
    }

    /// Reads `rows` of it, which `meta` describes, into `out`.
    pub fn read(&self, base: &dyn Source, meta: &TensorMeta, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let wide = self.folds.iter().rev().fold(rows.clone(), |rows, fold| fold.span(rows));
        if meta.shape.len() > 1 && wide != rows {
            let cols = out.len() / rows.len().max(1);
            let mut all = vec![0.0; wide.len() * cols];
            self.read_rows(base, meta, wide.clone(), &mut all)?;
            out.copy_from_slice(&all[(rows.start - wide.start) * cols..][..out.len()]);
            return Ok(());
        }
        self.read_rows(base, meta, rows, out)
    }

    /// Reads `rows`, which are all that the changes of them need.
    fn read_rows(&self, base: &dyn Source, meta: &TensorMeta, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.read_origin(base, rows.clone(), out)?;
        let cols = out.len() / rows.len().max(1);
        for (row, values) in self.rows.range(rows.clone()) {
            out[(row - rows.start) * cols..][..cols].copy_from_slice(values);
        }
        for fold in &self.folds {
            // A vector is one row, and its elements are the layer's outputs.
            if meta.shape.len() == 1 { fold.bias(out) } else { fold.weight(rows.clone(), out) }
        }
        Ok(())
    }

    /// As it was before adapters of layers.
    pub fn read_origin(&self, base: &dyn Source, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        match &self.origin {
            Origin::Base(at) => base.read_rows(*at, rows, out),
            Origin::Brought(float, tensor) => {
                let size = out.len() / rows.len().max(1) * float.size();
                widen(*float, &tensor.bytes[rows.start * size..rows.end * size], out);
                Ok(())
            }
        }
    }
}

impl Merged {
    /// Puts the weights that `file` brings in place of the base's.
    pub(super) fn replace(&mut self, file: &AdapterFile) -> Result<()> {
        // A head that keeps the base's embedding is set apart before that changes.
        let seen = file.replaced.seen_by_head(self.model.as_ref()).map(WholeTensor::name);
        let embedding = self.embedding().name.clone();
        let tied = self.model.config().tied_head;
        if tied && seen.is_none() && file.replaced.whole.iter().any(|w| w.name() == embedding) {
            self.own_head();
        }
        for whole in &file.replaced.whole {
            let (at, float) = weight_of(self.model.as_ref(), file, whole)?;
            let name = whole.name();
            let spec = &self.model.params()[at];
            let head = spec.role == Role::Embedding && name != spec.name;
            let key = if whole.copy { format!("{name} (copy)") } else { name.clone() };
            if let Some((other, tensor)) = self.brought.get(&key) {
                if tensor.bytes == whole.tensor.bytes {
                    continue;
                }
                return Err(brought_twice(file, &name, other));
            }
            self.brought.insert(key, (file.dir.clone(), whole.tensor.clone()));
            let index =
                if head { self.own_head() } else { self.find(&spec.name.clone()).expect("the base was checked") };
            self.tensors[index].shape.clone_from(&whole.tensor.shape);
            self.tensors[index].dtype = format!("{:?}", whole.tensor.dtype);
            self.weights[index] = Weight::new(Origin::Brought(float, whole.tensor.clone()));
        }
        file.replaced.rows.iter().try_for_each(|rows| self.put_rows(file, rows))
    }

    /// Puts single rows of an embedding in their places; a head that is the embedding has them, too.
    fn put_rows(&mut self, file: &AdapterFile, new: &Rows) -> Result<()> {
        let name = format!("{}.weight", new.module);
        let mismatch = |message: String| {
            let place = format!("`{}`: new rows of `{}`", file.dir.display(), new.module);
            Error::new(ErrorCode::AdapterMismatch, place, message)
        };
        let at = self.find(&name).or_else(|| (name == HEAD).then(|| self.own_head()));
        let at = at.ok_or_else(|| mismatch("expected an embedding of this base, got none of that name".to_owned()))?;
        let [rows, cols] = self.tensors[at].shape[..] else {
            return Err(mismatch("expected a matrix in the base, got a vector".to_owned()));
        };
        new.check(&file.dir, [rows, cols])?;
        let placed = Arc::make_mut(&mut self.weights[at].rows);
        placed.extend(new.ids.iter().map(|id| *id as usize).zip(new.values.data.chunks(cols).map(<[f32]>::to_vec)));
        Ok(())
    }

    /// Checks that embedding and head know the same tokens, and tells the config how many.
    pub(super) fn check_vocabulary(&mut self, adapters: &[(AdapterFile, f32)]) -> Result<()> {
        let rows = |name: &str| self.find(name).map(|at| self.tensors[at].shape[0]);
        let table = rows(&self.embedding().name).expect("the base was checked");
        match rows(HEAD).filter(|head| *head != table) {
            Some(head) => {
                let place = adapters.iter().map(|(file, _)| format!("`{}`", file.dir.display())).collect::<Vec<_>>();
                let message = format!(
                    "expected an embedding and a head of the same vocabulary, got {table} and {head} rows; save the \
                     adapter again with both of them (`save_embedding_layers=True`)"
                );
                Err(Error::new(ErrorCode::AdapterMismatch, place.join(", "), message))
            }
            None => {
                if table != self.model.config().vocab_size {
                    self.config.insert(VOCABULARY.to_owned(), table.into());
                }
                Ok(())
            }
        }
    }
}
