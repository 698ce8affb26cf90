//! The metadata of one architecture, by what they say.

use super::container::Container;
use super::value::{Metadata, Value};
use crate::error::{Error, Result};
use std::fmt::Display;

/// The keys of one architecture, and the tensors beside them.
pub(super) struct Keys<'a> {
    pub(super) file: &'a Container,
    pub(super) arch: &'a str,
}

impl<'a> Keys<'a> {
    pub(super) fn meta(&self) -> &'a Metadata {
        &self.file.metadata
    }

    pub(super) fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    pub(super) fn fail(&self, key: &str, expected: impl Display, got: impl Display) -> Error {
        self.meta().fail(&self.name(key), expected, got)
    }

    /// The error for a variant of the architecture that has no counterpart among the families.
    pub(super) fn refuse(&self, what: impl Display) -> Error {
        Error::unsupported(self.meta().path(), what, "use the model's safetensors files")
    }

    pub(super) fn has(&self, tensor: &str) -> bool {
        self.shape(tensor).is_some()
    }

    /// Whether queries have a bias, in a tensor of their own or in one with those of keys and values.
    pub(super) fn biased_queries(&self) -> bool {
        ["blk.0.attn_q.bias", "blk.0.attn_qkv.bias"].iter().any(|bias| self.has(bias))
    }

    /// The shape of `tensor`, row-major.
    pub(super) fn shape(&self, tensor: &str) -> Option<&'a [usize]> {
        self.file.tensors.iter().find(|t| t.name == tensor).map(|t| &t.shape[..])
    }

    /// A size that may be absent; zero, which some writers use for "none", counts as absent.
    pub(super) fn optional_size(&self, key: &str) -> Result<Option<usize>> {
        Ok(self.meta().uint(&self.name(key))?.filter(|&n| n > 0))
    }

    pub(super) fn size(&self, key: &str) -> Result<usize> {
        let size = self.optional_size(key)?;
        size.ok_or_else(|| self.fail(key, "a positive size", "none"))
    }

    /// The whole numbers of a list with at least one for each of `layers`; `None` where there is no list.
    pub(super) fn sizes(&self, key: &str, layers: usize) -> Result<Option<Vec<usize>>> {
        self.list(key, layers, "whole numbers", |value| value.as_u64().and_then(|n| usize::try_from(n).ok()))
    }

    /// The switches of such a list.
    pub(super) fn switches(&self, key: &str, layers: usize) -> Result<Option<Vec<bool>>> {
        self.list(key, layers, "true or false", |value| match value {
            Value::Bool(switch) => Some(*switch),
            other => other.as_u64().map(|n| n != 0),
        })
    }

    fn list<T>(
        &self,
        key: &str,
        layers: usize,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let name = self.name(key);
        let Some(Value::Array(list)) = self.meta().get(&name) else { return Ok(None) };
        // Layers that predict further tokens come behind the others.
        if list.len() < layers || list.len() > self.size("block_count")? {
            return Err(self.fail(key, format_args!("one for each of {layers} layers"), list.len()));
        }
        let one = |value: Result<Value>| {
            let value = value?;
            read(&value).ok_or_else(|| self.fail(key, expected, format_args!("{value:?}")))
        };
        list.values(self.meta().path(), &name).take(layers).map(one).collect::<Result<_>>().map(Some)
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>> {
        self.meta().float(&self.name(key))
    }

    pub(super) fn positive(&self, key: &str) -> Result<Option<f64>> {
        match self.number(key)? {
            Some(x) if x <= 0.0 => Err(self.fail(key, "a positive number", x)),
            x => Ok(x),
        }
    }

    /// A factor; where there is none, or 0, it is `default`.
    pub(super) fn factor(&self, key: &str, default: f64) -> Result<f64> {
        match self.number(key)?.filter(|said| *said != 0.0) {
            Some(bad) if bad < 0.0 || !bad.is_finite() => Err(self.fail(key, "a positive number", bad)),
            said => Ok(said.unwrap_or(default)),
        }
    }

    /// Checks that a size, where given, is `size`.
    pub(super) fn same(&self, key: &str, size: usize) -> Result<()> {
        match self.optional_size(key)? {
            Some(n) if n != size => Err(self.fail(key, format_args!("the head size {size}"), n)),
            _ => Ok(()),
        }
    }
}
