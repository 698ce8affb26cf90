//! What a sequence remembers, for a file and back from it, byte by byte.

use super::sequence::{Sequence, Snapshot, State};
use crate::adapter::{Adapters, last_invocation};
use crate::base::Base;
use crate::error::Result;
use pocketlora_kernels::cpu::Image;
use pocketlora_kernels::{CacheType, Cpu, Memory as _};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// What is kept beside the bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct KeptFacts {
    len: usize,
    reach: usize,
    expected: usize,
    ids: Vec<u32>,
    /// Virtual tokens before its own.
    prefix: Option<usize>,
    /// Of each cache, by the number of its state, the tokens appended and the blocks dropped.
    caches: Vec<(usize, usize, usize)>,
    /// Lengths of its snapshots.
    snapshots: Vec<usize>,
}

/// Bytes by their names.
pub(crate) type Parts<'a> = Vec<(String, Cow<'a, [u8]>)>;
/// Finds bytes by their name.
pub(crate) type Find<'a> = dyn Fn(&str) -> Option<&'a [u8]> + 'a;

/// Longest text that is believed: far more than any model reads, and no sum of such lengths overflows.
const MOST_TOKENS: usize = u32::MAX as usize;

impl Sequence<Cpu> {
    /// What it remembers.
    ///
    /// # Errors
    /// Device lost.
    pub(crate) fn kept(&mut self, base: &Base<Cpu>) -> Result<(KeptFacts, Parts<'_>)> {
        let (mut parts, mut caches) = (Parts::new(), Vec::new());
        for (i, state) in self.states.iter_mut().enumerate() {
            match state {
                State::Kv(cache) => {
                    let Image { len, dropped, blocks, scales } = cache.image();
                    caches.push((i, len, dropped));
                    parts.push((format!("state.{i}.blocks"), Cow::Borrowed(blocks)));
                    parts.push((format!("state.{i}.scales"), Cow::Owned(to_bytes(scales))));
                }
                State::Conv(buffer) | State::Matrix(buffer) => {
                    parts.push((format!("state.{i}.values"), Cow::Owned(to_bytes(&values(base, buffer)?))));
                }
            }
        }
        for (i, snapshot) in self.snapshots.iter().enumerate() {
            for (k, copy) in snapshot.copies.iter().enumerate() {
                parts.push((format!("snapshot.{i}.{k}"), Cow::Owned(to_bytes(&values(base, copy)?))));
            }
        }
        let facts = KeptFacts {
            len: self.len,
            reach: self.reach,
            expected: self.expected,
            ids: self.ids.clone(),
            prefix: self.prefix.as_ref().map(|prefix| prefix.tokens),
            caches,
            snapshots: self.snapshots.iter().map(|snapshot| snapshot.len).collect(),
        };
        Ok((facts, parts))
    }

    /// A sequence that remembers what was kept of one with the same model, cache type and adapters; none where the parts
    /// contradict each other or these.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn restored(
        base: &Base<Cpu>,
        dtype: CacheType,
        adapters: &Adapters<Cpu>,
        facts: &KeptFacts,
        find: &Find<'_>,
    ) -> Result<Option<Self>> {
        let mut sequence = Self::new(base, dtype)?;
        let prefix = adapters.before().filter(|_| facts.prefix.is_some());
        let lengths = [facts.len, facts.reach, facts.expected].into_iter().chain(facts.snapshots.iter().copied());
        if facts.prefix != prefix.map(|prefix| prefix.tokens) || lengths.max() > Some(MOST_TOKENS) {
            return Ok(None);
        }
        let rows = facts.len + facts.prefix.unwrap_or(0);
        for (i, state) in sequence.states.iter_mut().enumerate() {
            let part = |name: &str| find(&format!("state.{i}.{name}"));
            let whole = match state {
                State::Kv(cache) => {
                    let there = facts.caches.iter().find(|(state, ..)| *state == i);
                    let (Some(&(_, len, dropped)), Some(blocks), Some(scales)) =
                        (there, part("blocks"), part("scales").and_then(to_floats))
                    else {
                        return Ok(None);
                    };
                    len == rows && cache.restore(&Image { len, dropped, blocks, scales: &scales })?
                }
                State::Conv(buffer) | State::Matrix(buffer) => write(base, buffer, part("values")),
            };
            if !whole {
                return Ok(None);
            }
        }
        for (i, &len) in facts.snapshots.iter().enumerate() {
            let mut snapshot = Snapshot { len, copies: Vec::new() };
            for (k, state) in sequence.states.iter_mut().filter_map(State::buffer).enumerate() {
                let mut copy = base.backend.buffer(base.backend.len(state))?;
                if !write(base, &mut copy, find(&format!("snapshot.{i}.{k}"))) {
                    return Ok(None);
                }
                snapshot.copies.push(copy);
            }
            if len > facts.len || snapshot.copies.is_empty() || i >= super::sequence::SNAPSHOTS {
                return Ok(None);
            }
            sequence.snapshots.push(snapshot);
        }
        // Of a model that reads long texts in another way all tokens are known, of others none.
        // So are those of one whose adapters work behind an invocation.
        let invocation = adapters.invocation().cloned();
        let known = if invocation.is_some() || base.model.long_ropes(usize::MAX) > 0 { facts.len } else { 0 };
        if facts.ids.len() != known {
            return Ok(None);
        }
        sequence.ids.clone_from(&facts.ids);
        sequence.active = invocation.as_ref().and_then(|own| last_invocation(own, &facts.ids));
        sequence.invocation = invocation;
        sequence.prefix = prefix.cloned();
        sequence.before = facts.prefix.unwrap_or(0);
        (sequence.len, sequence.reach, sequence.expected) = (facts.len, facts.reach, facts.expected);
        Ok(Some(sequence))
    }
}

fn values(base: &Base<Cpu>, buffer: &pocketlora_kernels::cpu::Buffer) -> Result<Vec<f32>> {
    let mut values = vec![0.0; base.backend.len(buffer)];
    base.backend.read(buffer, &mut values)?;
    Ok(values)
}

/// Fills `buffer` from `bytes`; returns whether they are as many.
fn write(base: &Base<Cpu>, buffer: &mut pocketlora_kernels::cpu::Buffer, bytes: Option<&[u8]>) -> bool {
    let Some(values) = bytes.and_then(to_floats) else { return false };
    let fits = values.len() == base.backend.len(buffer);
    if fits {
        base.backend.write(buffer, &values);
    }
    fits
}

fn to_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn to_floats(bytes: &[u8]) -> Option<Vec<f32>> {
    let (values, rest) = bytes.as_chunks::<4>();
    rest.is_empty().then(|| values.iter().map(|value| f32::from_le_bytes(*value)).collect())
}
