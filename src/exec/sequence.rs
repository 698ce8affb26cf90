//! A text that grows, with what each layer remembers of it.

use super::pass::virtual_number;
use crate::adapter::{Adapters, Prefix, last_invocation};
use crate::base::Base;
use crate::error::{Error, ErrorCode, Result};
use pocketlora_kernels::cpu::Cache;
use pocketlora_kernels::{Backend, CacheType, Call};
use pocketlora_models::StateSpec;
use std::sync::Arc;

/// Why calls that only move numbers do not fail.
const NO_MEMORY: &str = "a call that takes no memory cannot fail";
/// Snapshots that a sequence keeps; the oldest goes first.
pub(super) const SNAPSHOTS: usize = 2;

/// One of a model's states, see [`StateSpec`].
pub(super) enum State<B: Backend> {
    /// Keys and values. They can be cut back by themselves.
    Kv(B::Cache),
    /// The last inputs of a convolution `[taps - 1, channels]`, zero before the first.
    Conv(B::Buffer),
    /// Matrices `[heads, key, value]`, zero before the first token.
    Matrix(B::Buffer),
}

impl<B: Backend> State<B> {
    fn new(base: &Base<B>, spec: &StateSpec, dtype: CacheType) -> Result<Self> {
        let backend = &base.backend;
        Ok(match *spec {
            StateSpec::Kv { kv_heads, head_dim, window } => Self::Kv(backend.cache(kv_heads, head_dim, dtype, window)),
            StateSpec::Conv { channels, taps } => Self::Conv(backend.buffer(channels * (taps - 1))?),
            StateSpec::Matrix { heads, key, value } => Self::Matrix(backend.buffer(heads * key * value)?),
        })
    }

    /// What must be copied to come back to it later.
    pub(super) fn buffer(&mut self) -> Option<&mut B::Buffer> {
        match self {
            Self::Kv(_) => None,
            Self::Conv(buffer) | Self::Matrix(buffer) => Some(buffer),
        }
    }
}

/// Bytes that the states `specs` of a text of `tokens` tokens hold at most, with keys and values kept as `dtype`. What cannot
/// be cut back is there once more for each snapshot.
pub fn state_bytes(specs: &[StateSpec], dtype: CacheType, tokens: usize) -> u64 {
    let copied = |values: usize| (1 + SNAPSHOTS) * size_of::<f32>() * values;
    let bytes = |spec: &StateSpec| match *spec {
        StateSpec::Kv { kv_heads, head_dim, window } => Cache::most_bytes(kv_heads, head_dim, dtype, window, tokens),
        StateSpec::Conv { channels, taps } => copied(channels * (taps - 1)),
        StateSpec::Matrix { heads, key, value } => copied(heads * key * value),
    };
    specs.iter().map(|spec| bytes(spec) as u64).sum()
}

/// Copies of the states that cannot be cut back, as they were after `len` tokens.
pub(super) struct Snapshot<B: Backend> {
    pub len: usize,
    pub copies: Vec<B::Buffer>,
}

/// A text that grows by steps. It owns what each layer remembers of it.
pub struct Sequence<B: Backend> {
    pub(super) states: Vec<State<B>>,
    pub(super) len: usize,
    /// Tokens, virtual ones among them, that it is taken to have in the end: some models turn those of long texts by other
    /// angles.
    pub(super) reach: usize,
    /// What was said with [`Sequence::expect`].
    pub(super) expected: usize,
    /// Of such a model all tokens, which it then reads anew.
    pub(super) ids: Vec<u32>,
    /// The virtual tokens before its own: they are in its states, and are not counted.
    pub(super) prefix: Option<Prefix>,
    /// How many of them are there already.
    pub(super) before: usize,
    /// The invocation of its adapters, if they have one: they have worked from its last occurrence on.
    pub(super) invocation: Option<Arc<[u32]>>,
    /// Where that begins.
    pub(super) active: Option<usize>,
    pub(super) snapshots: Vec<Snapshot<B>>,
}

impl<B: Backend> Sequence<B> {
    /// An empty sequence for `base`, with keys and values kept as `dtype`.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(base: &Base<B>, dtype: CacheType) -> Result<Self> {
        let states = base.model.states().iter().map(|spec| State::new(base, spec, dtype)).collect::<Result<_>>()?;
        Ok(Self {
            states,
            len: 0,
            reach: 0,
            expected: 0,
            ids: Vec::new(),
            prefix: None,
            before: 0,
            invocation: None,
            active: None,
            snapshots: Vec::new(),
        })
    }

    /// Tokens held.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no token is held.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Says that it will have so many tokens, virtual ones among them, before it is read on: a model that reads long texts
    /// in another way begins so.
    pub fn expect(&mut self, tokens: usize) {
        self.expected = tokens;
    }

    /// Takes note of tokens that have been run.
    pub(super) fn extend(&mut self, base: &Base<B>, ids: &[u32]) {
        if ids.first().is_some_and(|id| virtual_number(*id).is_some()) {
            self.before += ids.len();
            return;
        }
        self.len += ids.len();
        if self.invocation.is_some() || base.model.long_ropes(usize::MAX) > 0 {
            self.ids.extend_from_slice(ids);
        }
    }

    /// Takes it to have `reach` tokens in the end, or as many as are expected. Where what it holds is no part of so long a
    /// text, it then holds nothing, and what it held is returned.
    pub(super) fn stretch(&mut self, base: &Base<B>, reach: usize) -> Vec<u32> {
        let held = if self.len == 0 { 0 } else { self.reach };
        let reach = reach.max(self.expected).max(held);
        let mut ids = Vec::new();
        if self.len > 0 && base.model.long_ropes(reach) != base.model.long_ropes(self.reach) {
            ids.clone_from(&self.ids);
            self.rewind(base, 0);
            self.expected = reach;
        }
        self.reach = reach;
        ids
    }

    /// Takes note of where the invocation of `adapters` is with the tokens `ids` behind its own. Where what it holds was read
    /// with the adapters on the other side of it, it then holds less, and the tokens to be read again are returned.
    ///
    /// # Errors
    /// It was begun with adapters of another invocation, or of none.
    pub(super) fn activate(&mut self, base: &Base<B>, adapters: &Adapters<B>, ids: &[u32]) -> Result<Vec<u32>> {
        if self.len == 0 {
            (self.invocation, self.active) = (adapters.invocation().cloned(), None);
        } else if self.invocation.as_ref() != adapters.invocation() {
            let message = "expected the invocation tokens that it was begun with, got an adapter without them or with \
                           others; begin a new text for another adapter";
            return Err(Error::new(ErrorCode::Config, "sequence", message));
        }
        let Some(invocation) = self.invocation.clone() else { return Ok(Vec::new()) };
        // One that ends in the new tokens, and may begin before them.
        let seen = self.len.saturating_sub(invocation.len().saturating_sub(1));
        let tail: Vec<u32> = self.ids[seen..].iter().chain(ids).copied().collect();
        let Some(start) = last_invocation(&invocation, &tail).map(|at| seen + at) else { return Ok(Vec::new()) };
        // From the earlier one to this the adapters have worked, and shall not have; or the other way round.
        let wrong = [self.active, Some(start)].into_iter().flatten().min().unwrap_or(start);
        let mut again = Vec::new();
        if self.active != Some(start) && wrong < self.len {
            let held = self.ids.clone();
            let reached = self.cut(base, wrong);
            again = held[reached..].to_vec();
        }
        self.active = Some(start);
        Ok(again)
    }

    /// How far it may be cut back to at most `to` tokens, so that what it then holds was read with its last invocation as
    /// the last one.
    fn consistent(&self, mut to: usize) -> (usize, Option<usize>) {
        let Some(invocation) = &self.invocation else { return (to, None) };
        loop {
            let last = last_invocation(invocation, &self.ids[..to]);
            let cut = [last, self.active].into_iter().flatten().filter(|at| *at < to).min();
            match cut {
                Some(cut) if last != self.active => to = cut,
                _ => return (to, last),
            }
        }
    }

    /// Puts the virtual tokens of `adapters` before the first token, if they are keys and values. Those that are read are
    /// left to the caller: so many more.
    ///
    /// # Errors
    /// The sequence was begun with others, out of memory.
    pub(super) fn begin(&mut self, base: &Base<B>, adapters: &Adapters<B>) -> Result<usize> {
        let same = match (&self.prefix, adapters.before()) {
            (Some(own), Some(prefix)) => own.is(prefix),
            (own, prefix) => own.is_none() && prefix.is_none(),
        };
        if same {
            return Ok(0);
        }
        if self.len > 0 {
            let message = "expected the virtual tokens that it was begun with, got an adapter without them or with others; \
                           begin a new text for another adapter";
            return Err(Error::new(ErrorCode::Config, "sequence", message));
        }
        self.clear(base);
        let Some(prefix) = adapters.before() else { return Ok(0) };
        if prefix.is_read() {
            self.prefix = Some(prefix.clone());
            return Ok(prefix.tokens);
        }
        match self.put_before(base, adapters, prefix) {
            Ok(()) => (self.prefix, self.before) = (Some(prefix.clone()), prefix.tokens),
            Err(e) => {
                self.clear(base);
                return Err(e);
            }
        }
        Ok(0)
    }

    /// Leaves nothing in the states.
    pub(super) fn clear(&mut self, base: &Base<B>) {
        for state in &mut self.states {
            match state {
                State::Kv(cache) => {
                    base.backend.cache_rewind(cache, 0);
                }
                State::Conv(buffer) | State::Matrix(buffer) => {
                    base.backend.run(Call::Zero { x: buffer }).expect(NO_MEMORY);
                }
            }
        }
        (self.prefix, self.before) = (None, 0);
    }

    fn put_before(&mut self, base: &Base<B>, adapters: &Adapters<B>, prefix: &Prefix) -> Result<()> {
        let backend = &base.backend;
        for (layer, state) in self.states.iter_mut().enumerate() {
            let State::Kv(cache) = state else { continue };
            let StateSpec::Kv { kv_heads, head_dim, .. } = base.model.states()[layer] else { continue };
            let part = |part| -> Result<B::Buffer> {
                let mut rows = backend.buffer(prefix.tokens * kv_heads * head_dim)?;
                backend.run(Call::GatherRows {
                    x: adapters.held().buffer(prefix.tensor()),
                    rows: &prefix.rows(layer, part),
                    y: &mut rows,
                })?;
                Ok(rows)
            };
            let (keys, values) = (part(0)?, part(1)?);
            backend.run(Call::CacheAppend { cache, k: &keys, v: &values, rows: 0..prefix.tokens })?;
        }
        Ok(())
    }

    /// Whether some of its states can be cut back only to a snapshot, or to nothing.
    pub fn needs_snapshots(&mut self) -> bool {
        self.states.iter_mut().any(|state| state.buffer().is_some())
    }

    /// Remembers the present length as one that [`Sequence::rewind`] can come back to. Costs nothing where all states can
    /// be cut back.
    ///
    /// # Errors
    /// Out of memory.
    pub fn snapshot(&mut self, base: &Base<B>) -> Result<()> {
        if !self.needs_snapshots() || self.snapshots.iter().any(|snapshot| snapshot.len == self.len) {
            return Ok(());
        }
        // Its memory serves again.
        let mut copies = if self.snapshots.len() < SNAPSHOTS { Vec::new() } else { self.snapshots.remove(0).copies };
        for (i, state) in self.states.iter_mut().filter_map(State::buffer).enumerate() {
            if copies.len() <= i {
                copies.push(base.backend.buffer(base.backend.len(state))?);
            }
            base.backend.run(Call::Copy { x: state, y: &mut copies[i] })?;
        }
        self.snapshots.push(Snapshot { len: self.len, copies });
        Ok(())
    }

    /// Keeps the first tokens, as when a chat's history was edited: `to` of them or, where some state cannot be cut back
    /// so far, fewer. Returns how many are kept.
    pub fn rewind(&mut self, base: &Base<B>, to: usize) -> usize {
        if to >= self.len {
            return self.len;
        }
        let (to, active) = self.consistent(to);
        let reached = self.cut(base, to);
        // Some states keep less than they were asked to; the invocation may be gone with the rest.
        self.active = active.filter(|at| self.invocation.as_ref().is_some_and(|own| at + own.len() <= reached));
        reached
    }

    /// As [`Sequence::rewind`], whatever its adapters' invocation.
    fn cut(&mut self, base: &Base<B>, to: usize) -> usize {
        let backend = &base.backend;
        let mut reached = if self.needs_snapshots() {
            self.snapshots.retain(|snapshot| snapshot.len <= to);
            let latest = self.snapshots.iter().max_by_key(|snapshot| snapshot.len);
            let mut copies = latest.map(|snapshot| snapshot.copies.iter());
            for state in self.states.iter_mut().filter_map(State::buffer) {
                match copies.as_mut().and_then(Iterator::next) {
                    Some(copy) => backend.run(Call::Copy { x: copy, y: state }).expect(NO_MEMORY),
                    None => backend.run(Call::Zero { x: state }).expect(NO_MEMORY),
                }
            }
            latest.map_or(0, |snapshot| snapshot.len)
        } else {
            to
        };
        let virtual_tokens = self.prefix.as_ref().map_or(0, |prefix| prefix.tokens);
        // What is left of a long text may be read as a short one.
        if base.model.long_ropes(virtual_tokens + reached) != base.model.long_ropes(self.reach) {
            reached = 0;
        }
        // A cache with a window may have dropped what the next token sees, and keeps nothing then; the others follow.
        for _ in 0..2 {
            for state in &mut self.states {
                if let State::Kv(cache) = state {
                    let rows = if reached == 0 { 0 } else { virtual_tokens + reached };
                    reached = backend.cache_rewind(cache, rows).saturating_sub(virtual_tokens);
                }
            }
        }
        if reached == 0 {
            self.states.iter_mut().filter_map(State::buffer).for_each(|state| {
                backend.run(Call::Zero { x: state }).expect(NO_MEMORY);
            });
            // The next first token may come with another adapter.
            (self.prefix, self.before) = (None, 0);
            // The caches hold nothing that a snapshot could go on from.
            self.snapshots.clear();
            self.expected = 0;
        }
        self.len = reached;
        self.ids.truncate(reached);
        reached
    }
}
