//! The CPU backend: [`Cpu`] implements [`Backend`] by calling one file per op.
//!
//! The ops that dominate time (`nf4`, `q8`, `dense`, `tile`, `attention`) have a text per instruction set, picked at run
//! time through [`Table`]; the loops of the others are written once and compiled for each (`light`).

mod adamw;
mod adamw8;
#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bf16;
mod blocks;
mod buffer;
mod cache;
mod columns;
mod conv;
mod cost;
mod cross_entropy;
mod decay;
mod delta_rule;
mod dense;
mod elementwise;
mod exp;
mod factors;
mod gated;
mod lanes;
mod layer_norm;
mod light;
pub mod limits;
mod linear_cross_entropy;
mod loops;
#[cfg(target_arch = "x86_64")]
mod maker;
mod map;
mod matmul;
mod matrix;
mod memory;
mod narrow;
#[cfg(target_arch = "aarch64")]
mod neon;
mod nf4;
mod q8;
mod rms_norm;
mod rope;
mod route;
mod rows;
mod sgd;
mod shelf;
mod soft_targets;
mod softmax;
mod split;
mod state_space;
mod table;
mod team;
mod tile;
mod turns;

pub use adamw8::Codes;
pub use buffer::Buffer;
pub use cache::{Cache, Image};
pub use map::Map;
pub use matrix::Matrix;
pub use table::{Isa, Table};

use crate::{Arithmetic, Backend, Call, Error, Memory, double};
pub(crate) use cost::Cost;
use rms_norm::Factors;
use shelf::Shelf;
use team::Team;

/// The CPU: a team of threads and the kernels of one instruction set.
pub struct Cpu {
    table: &'static Table,
    team: Team,
    shelf: Shelf,
}

impl Cpu {
    /// The best kernels for this machine on `threads` threads, all cores if 0. [`Table::from_env`] tells
    /// whether `POCKETLORA_ISA` holds a name that this ignores.
    #[must_use]
    pub fn new(threads: usize) -> Self {
        Self::with_table(threads, Table::best())
    }

    /// The kernels of `table` on `threads` threads, all cores if 0.
    #[must_use]
    pub fn with_table(threads: usize, table: &'static Table) -> Self {
        let cores = || std::thread::available_parallelism().map_or(1, usize::from);
        let team = Team::new(if threads == 0 { cores() } else { threads });
        Self { table, team, shelf: Shelf::default() }
    }

    /// The instruction set of the kernels.
    #[must_use]
    pub fn isa(&self) -> Isa {
        self.table.isa()
    }

    /// Threads that ops run on, the caller's included.
    #[must_use]
    pub fn threads(&self) -> usize {
        self.team.active()
    }
}

/// Passes over the weights that [`Cpu::choose_threads`] times for each number of threads.
const TRIALS: usize = 8;
/// A further thread must save this share of the time: it costs power, and other apps want cores, too.
const WORTH: f64 = 0.04;

impl Cpu {
    /// Times products of one token with `weights` on `least` and more threads, and lets ops use as many as pay from then
    /// on. Results do not depend on it. Takes some milliseconds; does nothing on one thread. The numbers take turns, so
    /// that what else runs for a moment slows them alike.
    pub fn choose_threads(&self, weights: &[&Matrix], least: usize) {
        let inputs: Vec<_> = weights.iter().map(|w| vec![0.0; w.shape().1]).collect();
        let mut outputs: Vec<_> = weights.iter().map(|w| vec![0.0; w.shape().0]).collect();
        let all = self.team.threads();
        let tried = (least.clamp(1, all)..=all).filter(|n| *n <= 4 || n.is_multiple_of(2) || *n == all);
        let mut fastest: Vec<_> = tried.map(|threads| (threads, f64::INFINITY)).collect();
        for _ in 0..TRIALS {
            for (threads, seconds) in &mut fastest {
                self.team.set_active(*threads);
                let start = std::time::Instant::now();
                for ((w, x), y) in weights.iter().zip(&inputs).zip(&mut outputs) {
                    matmul::forward(self, Arithmetic::Int8, w, x, y, false);
                }
                *seconds = seconds.min(start.elapsed().as_secs_f64());
            }
        }
        let pays = |best: (usize, f64), next: (usize, f64)| if next.1 < best.1 * (1.0 - WORTH) { next } else { best };
        self.team.set_active(fastest.into_iter().reduce(pays).map_or(1, |(threads, _)| threads));
    }

    /// Threads that there are, whether or not ops run on all of them.
    #[must_use]
    pub fn most_threads(&self) -> usize {
        self.team.threads()
    }
}

impl Backend for Cpu {
    fn run(&self, call: Call<'_, Self>) -> Result<(), Error> {
        let (team, light) = (&self.team, self.table.light());
        match call {
            Call::Embed { table, ids, y } => rows::embed(self, table, ids, y),
            Call::GatherRows { x, rows, y } => rows::gather(team, x, rows, y),
            Call::ScatterAddRows { x, rows, y } => rows::scatter_add(x, rows, y),
            Call::Matmul { arithmetic, w, x, y, accumulate } => matmul::forward(self, arithmetic, w, x, y, accumulate),
            Call::MatmulGroup { arithmetic, x, products } => matmul::group(self, arithmetic, x, products)?,
            Call::MatmulVjpX { arithmetic, terms, dx, accumulate } => {
                matmul::vjp_x(self, arithmetic, terms, dx, accumulate);
            }
            Call::MatmulVjpW { tokens, dy, x, dw } => matmul::vjp_w(self, tokens, dy, x, dw),
            Call::AddBias { bias, y } => elementwise::add_bias(team, bias, y),
            Call::Add { a, b, y } => elementwise::add(team, a, b, y),
            Call::AddAssign { x, y } => elementwise::add_assign(team, x, y),
            Call::Scale { factor, x } => elementwise::scale(team, factor, x),
            Call::Dropout { p, key, first, x, y } => elementwise::dropout(team, p, key, first, x, y),
            Call::Copy { x, y } => elementwise::copy(team, x, y),
            Call::Narrow { width, x, y } => narrow::pack(team, width, x, y),
            Call::Widen { width, x, y } => narrow::unpack(team, width, x, y),
            Call::Zero { x } => elementwise::zero(team, x),
            Call::RmsNorm { width, w, plus_one, eps, x, y } => {
                rms_norm::forward(self, Factors { width, w: w.map(|w| &w[..]), plus_one }, eps, x, y);
            }
            Call::RmsNormVjpX { width, w, plus_one, eps, x, dy, dx } => {
                rms_norm::vjp_x(self, Factors { width, w: w.map(|w| &w[..]), plus_one }, eps, x, dy, dx);
            }
            Call::LayerNorm { w, b, eps, x, y } => layer_norm::forward(self, w, b.map(|b| &b[..]), eps, x, y),
            Call::LayerNormVjpX { w, eps, x, dy, dx } => layer_norm::vjp_x(self, w, eps, x, dy, dx),
            Call::Rope { heads, head_dim, cos, sin, x, inverse, pairs, y } => {
                rope::forward(self, heads, head_dim, cos, sin, x, inverse, pairs, y);
            }
            Call::Gate { activation, gate, up, y } => gated::forward(self, activation, gate, up, y),
            Call::GateVjp { activation, gate, up, dy, dgate, dup } => {
                gated::vjp(self, activation, gate, up, dy, dgate, dup);
            }
            Call::GateVjpInPlace { activation, dy, gate, up } => gated::vjp_in_place(self, activation, dy, gate, up),
            Call::Attention { spec, segments, q, k, v, sinks, y, lse } => {
                attention::forward(self, spec, segments, q, k, v, sinks.map(|s| &s[..]), y, lse);
            }
            Call::AttentionVjp { spec, segments, q, k, v, y, lse, dy, dq, dk, dv } => {
                attention::vjp(self, spec, segments, q, k, v, y, lse, dy, dq, dk, dv);
            }
            Call::CacheAppend { cache, k, v, rows } => cache.append(light, k, v, rows)?,
            Call::AttentionCached { spec, q, cache, sinks, y, rows } => {
                attention::forward_cached(self, spec, q, cache, sinks.map(|s| &s[..]), y, rows);
            }
            Call::Map { kind, x, y } => map::forward(self, kind, x, y),
            Call::MapVjp { kind, x, dy, dx } => map::vjp(self, kind, x, dy, dx),
            Call::Multiply { a, b, y } => factors::multiply(team, a, b, y),
            Call::ScaleRows { factors, x, y } => factors::scale_rows(team, factors, x, y),
            Call::DotRows { a, b, y } => factors::dot_rows(self, a, b, y),
            Call::ScaleColumns { factors, x, y } => factors::scale_columns(team, factors, x, y),
            Call::SumColumns { a, b, y } => factors::sum_columns(team, a, b.map(|b| &b[..]), y),
            Call::CopyColumns { width, x, x_at, y, y_at, accumulate } => {
                columns::copy(team, width, x, x_at, y, y_at, accumulate);
            }
            Call::BlockProduct { spec, transposed, w, x, y } => blocks::product(self, spec, transposed, w, x, y),
            Call::BlockProductVjpW { spec, dy, x, dw } => blocks::vjp_w(self, spec, dy, x, dw),
            Call::SparseProduct { rows, cols, tokens, w, x, y } => {
                blocks::sparse(team, (rows, cols), tokens, w, x, y);
            }
            Call::SparseProductVjpW { rows, cols, tokens, dy, x, dw } => {
                blocks::sparse_vjp_w(team, (rows, cols), tokens, dy, x, dw);
            }
            Call::Conv { w, bias, segments, x, y } => {
                conv::forward(self, w, bias.map(|bias| &bias[..]), segments, x, y);
            }
            Call::ConvVjpX { w, segments, dy, dx } => conv::vjp_x(self, w, segments, dy, dx),
            Call::ConvFrom { w, bias, state, x, y, rows } => {
                conv::forward_from(self, w, bias.map(|bias| &bias[..]), state, x, y, rows);
            }
            Call::Decay { rate, bias, a, g } => decay::forward(team, rate, bias, a, g),
            Call::DecayVjp { rate, bias, a, dg, da } => decay::vjp(team, rate, bias, a, dg, da),
            Call::DeltaRule { spec, segments, q, k, v, g, beta, y } => {
                delta_rule::forward(self, delta_rule::Inputs { spec, q, k, v, g, beta }, segments, y);
            }
            Call::DeltaRuleVjp { spec, segments, q, k, v, g, beta, dy, dq, dk, dv, dg, dbeta } => {
                let inputs = delta_rule::Inputs { spec, q, k, v, g, beta };
                delta_rule::vjp(self, inputs, segments, dy, [dq, dk, dv, dg, dbeta]);
            }
            Call::DeltaRuleFrom { spec, q, k, v, g, beta, state, y, rows } => {
                delta_rule::forward_from(self, delta_rule::Inputs { spec, q, k, v, g, beta }, state, y, rows);
            }
            Call::StateSpace { spec, segments, rate, bias, skip, x, b, c, dt, y } => {
                let inputs = state_space::Inputs { spec, rate, bias, skip, x, b, c, dt };
                state_space::forward(self, inputs, segments, y);
            }
            Call::StateSpaceVjp { spec, segments, rate, bias, skip, x, b, c, dt, dy, dx, db, dc, ddt } => {
                let inputs = state_space::Inputs { spec, rate, bias, skip, x, b, c, dt };
                state_space::vjp(self, inputs, segments, dy, [dx, db, dc, ddt]);
            }
            Call::StateSpaceFrom { spec, rate, bias, skip, x, b, c, dt, state, y, rows } => {
                let inputs = state_space::Inputs { spec, rate, bias, skip, x, b, c, dt };
                state_space::forward_from(self, inputs, state, y, rows);
            }
            Call::TopK { k, x, chosen } => route::top_k(self, k, x, chosen),
            Call::Route { top_k, scores, normalize, logits, chosen, weights } => {
                route::forward(self, top_k, (scores, normalize), logits, chosen, weights);
            }
            Call::RouteVjp { top_k, scores, normalize, logits, chosen, dweights, dlogits } => {
                route::vjp(self, top_k, (scores, normalize), logits, chosen, dweights, dlogits);
            }
            Call::CrossEntropy { targets, weights, logits, losses } => {
                cross_entropy::forward_vjp(self, targets, weights, logits, losses);
            }
            Call::LinearCrossEntropy { arithmetic, w, targets, weights, x, losses, dx } => {
                let dx = dx.map(|dx| &mut **dx);
                linear_cross_entropy::run(self, arithmetic, w, targets, weights, x, losses, dx)?;
            }
            Call::Sum { x, at, y } => double::add_double(x.iter().map(|x| f64::from(*x)).sum(), at, y),
            Call::SumSquares { x, at, y } => double::add_double(adamw::sum_squares(team, x), at, y),
            Call::AdamW { step, grad, param, m, v } => adamw::step(self, step, grad, param, m, v),
            Call::AdamW8 { step, grad, param, m, v } => adamw8::step(self, step, grad, param, m, v),
            Call::Sgd { step, grad, param, m } => sgd::sgd(self, step, grad, param, m.map(|m| &mut **m)),
            Call::Lion { step, grad, param, m } => sgd::lion(self, step, grad, param, m),
        }
        Ok(())
    }

    fn threads(&self) -> usize {
        self.team.threads()
    }

    fn table(&self) -> &'static Table {
        self.table
    }
}

/// What `call` takes beside its arguments where [`Cpu`] runs it with the kernels of `table`.
pub(crate) fn cost<M: Memory>(table: &Table, memory: &M, call: &Call<'_, M>) -> Cost {
    match call {
        Call::Matmul { arithmetic, w, x, .. } => matmul::cost(table, *arithmetic, memory.len(x), memory.shape(w)),
        Call::MatmulGroup { arithmetic, x, products } => {
            matmul::group_cost(table, memory, *arithmetic, memory.len(x), products)
        }
        Call::MatmulVjpX { arithmetic, terms, .. } => matmul::vjp_x_cost(table, memory, *arithmetic, terms),
        Call::MatmulVjpW { tokens, dy, x, .. } => matmul::vjp_w_cost(*tokens, memory.len(dy), memory.len(x)),
        Call::Attention { spec, segments, .. } => attention::cost(spec, segments),
        Call::AttentionVjp { spec, segments, .. } => attention::vjp_cost(spec, segments),
        Call::Conv { segments, x, .. } | Call::ConvVjpX { segments, dy: x, .. } => conv::cost(segments, memory.len(x)),
        Call::DeltaRule { spec, segments, .. } => delta_rule::cost(spec, segments),
        Call::DeltaRuleVjp { spec, segments, .. } => delta_rule::vjp_cost(spec, segments),
        Call::StateSpace { spec, segments, .. } => state_space::cost(spec, segments),
        Call::StateSpaceVjp { spec, segments, .. } => state_space::vjp_cost(spec, segments),
        Call::LinearCrossEntropy { w, targets, weights, arithmetic, .. } => {
            let ids = targets.ids.len();
            linear_cross_entropy::cost(table, *arithmetic, (weights.len(), ids), memory.shape(w))
        }
        _ => Cost::default(),
    }
}
