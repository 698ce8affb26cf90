//! How long values live: computed from what operations read, forward and backward, and from nothing else.

#[cfg(feature = "bench")]
use pocketlora_models::{Exec, Model, Param};
use pocketlora_models::{Op, Value};
use std::ops::Range;

/// An operation of a tape with the values that it touches.
#[derive(Clone)]
pub(super) struct Recorded {
    pub op: Op,
    /// The first value that it writes.
    pub y: Value,
    reads: Vec<Value>,
    /// What its backward reads.
    pub keeps: Vec<Value>,
    outputs: Range<u32>,
}

impl Recorded {
    fn new(op: Op, y: Value, keeps: Vec<Value>) -> Self {
        let outputs = y.0..y.0 + op.outputs().len() as u32;
        Self { reads: op.reads(), keeps, y, outputs, op }
    }

    /// The values that it writes.
    pub fn outputs(&self) -> impl Iterator<Item = Value> + use<> {
        self.outputs.clone().map(Value)
    }
}

/// Puts `op`, which writes from `y` on, behind `ops`. Its backward reads `keeps`, and what is needed to compute those of
/// them again that are dropped.
pub(super) fn record(ops: &mut Vec<Recorded>, op: Op, y: Value, mut keeps: Vec<Value>) {
    for t in keeps.clone() {
        sources(ops, t, &mut keeps);
    }
    // What is computed of others comes behind them.
    keeps.sort_by_key(|t| t.0);
    ops.push(Recorded::new(op, y, keeps));
}

/// What computes `t` again, if it is dropped rather than kept.
pub(super) fn maker(ops: &[Recorded], t: Value) -> Option<&Recorded> {
    ops.iter().find(|recorded| recorded.y == t && recorded.op.is_cheap())
}

/// Adds what must be there to compute `t` again, if it is dropped, beside what the backward of its own operation reads.
fn sources(ops: &[Recorded], t: Value, keeps: &mut Vec<Value>) {
    let Some(made) = maker(ops, t) else { return };
    for read in made.op.reads() {
        if !made.keeps.contains(&read) || maker(ops, read).is_some() {
            if !keeps.contains(&read) {
                keeps.push(read);
            }
            sources(ops, read, keeps);
        }
    }
}

/// For each of so many `values`, the number of the last of `ops` that reads it.
fn last_readers(ops: &[Recorded], values: usize) -> Vec<Option<usize>> {
    let mut last = vec![None; values];
    for (i, recorded) in ops.iter().enumerate() {
        recorded.reads.iter().for_each(|t| last[t.0 as usize] = Some(i));
    }
    last
}

/// Which values die where, when `ops` run forward and those that `keep` names outlive them.
pub(super) fn deaths(ops: &[Recorded], keep: &[bool]) -> Vec<Vec<Value>> {
    let last = last_readers(ops, keep.len());
    let mut deaths = vec![Vec::new(); ops.len()];
    for (i, recorded) in ops.iter().enumerate() {
        // An output may lead nowhere that is run.
        let unread = recorded.outputs().filter(|t| last[t.0 as usize].is_none());
        let mut dying: Vec<Value> =
            recorded.reads.iter().copied().filter(|t| last[t.0 as usize] == Some(i)).chain(unread).collect();
        dying.retain(|t| !keep[t.0 as usize]);
        dying.dedup();
        deaths[i] = dying;
    }
    deaths
}

/// Which of so many `values` must stay for backward through `ops`: what it reads and cannot cheaply compute again.
pub(super) fn kept_for_backward(ops: &[Recorded], values: usize) -> Vec<bool> {
    let mut keep = vec![false; values];
    ops.iter().flat_map(|recorded| &recorded.keeps).for_each(|t| keep[t.0 as usize] = true);
    for recorded in ops.iter().filter(|recorded| recorded.op.is_cheap()) {
        recorded.outputs().for_each(|t| keep[t.0 as usize] = false);
    }
    keep
}

/// How many of `ops` make what is to be kept, those before the last of these included: what runs again before backward.
pub(super) fn replayed(ops: &[Recorded], keep: &[bool]) -> usize {
    let makes = |recorded: &Recorded| recorded.outputs().any(|t| keep[t.0 as usize]);
    ops.iter().rposition(makes).map_or(0, |last| last + 1)
}

/// The weights of a layer whose products training computes once: those behind all that backward reads.
#[cfg(feature = "bench")]
pub(crate) fn multiplied_once(model: &dyn Model, layer: usize) -> Vec<Param> {
    /// Notes operations and runs none.
    struct Notes {
        ops: Vec<Recorded>,
        values: u32,
    }
    impl Exec for Notes {
        fn run(&mut self, op: Op) -> Value {
            let y = Value(self.values);
            self.values += op.outputs().len() as u32;
            let keeps = op.keeps(y);
            record(&mut self.ops, op, y, keeps);
            y
        }
    }
    let mut notes = Notes { ops: Vec::new(), values: 1 };
    model.layer(&mut notes, layer, Value(0));
    let keep = kept_for_backward(&notes.ops, notes.values as usize);
    let weights = |recorded: &Recorded| match &recorded.op {
        Op::Linears { layers, .. } => layers.iter().map(|layer| layer.weight).collect(),
        // The backward of experts computes their products again by itself.
        _ => Vec::new(),
    };
    notes.ops[replayed(&notes.ops, &keep)..].iter().flat_map(weights).collect()
}

/// How many of `ops` read each of so many `values` in their backward.
pub(super) fn backward_readers(ops: &[Recorded], values: usize) -> Vec<usize> {
    let mut readers = vec![0; values];
    ops.iter().flat_map(|recorded| &recorded.keeps).for_each(|t| readers[t.0 as usize] += 1);
    readers
}

/// The operation at whose backward most is held: the last of those that touch the widest rows.
pub(super) fn fullest(ops: &[Recorded], width: impl Fn(Value) -> usize) -> usize {
    let floats =
        |recorded: &Recorded| recorded.keeps.iter().copied().chain(recorded.outputs()).map(&width).sum::<usize>();
    (0..ops.len()).max_by_key(|&i| floats(&ops[i])).unwrap_or(0)
}

/// The number of the operation from which on rows no longer depend on each other, if there is any behind it.
pub(super) fn rows_part_at(ops: &[Recorded]) -> Option<usize> {
    let cut = ops.iter().rposition(|recorded| !recorded.op.is_row_wise())? + 1;
    (cut < ops.len()).then_some(cut)
}

/// Values from before operation `cut` that are read behind it.
pub(super) fn crossing(ops: &[Recorded], cut: usize) -> Vec<Value> {
    let made: Vec<Value> = ops[cut..].iter().flat_map(Recorded::outputs).collect();
    let mut crossing: Vec<Value> = ops[cut..].iter().flat_map(|recorded| recorded.reads.iter().copied()).collect();
    crossing.retain(|t| !made.contains(t));
    crossing.sort_unstable_by_key(|t| t.0);
    crossing.dedup();
    crossing
}
