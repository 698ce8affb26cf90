//! Speed of the ops that dominate time: one bench for each, on every instruction set of this CPU and at several shapes.
//!
//! `cargo bench -p pocketlora-kernels -- nf4_matvec` runs those whose name holds the given part, `THREADS=2` on more than
//! one thread. `cargo test --benches` runs each once, so that none rots. Items are multiplications and additions, or
//! elements of light ops; bytes are weights, or keys and values. Weights stay in the cache here; `pocketlora bench` has
//! them come from memory.

use bytes::Bytes;
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use pocketlora_kernels::cpu::{Buffer, Cpu, Matrix, Table};
use pocketlora_kernels::{
    ALL_ROWS, Absmax, Activation, Arithmetic, Attention, Backend, CacheType, Call, DeltaRule, FloatType, LowRank,
    MatrixData, MatrixSource, Memory, Nf4Source, Product, Targets, WorkType,
};
use std::fmt;
use std::sync::Arc;

fn main() {
    divan::main();
}

/// A product on one instruction set: `T` tokens by `[O, K]`.
struct Case {
    table: &'static Table,
    arithmetic: Arithmetic,
    t: usize,
    o: usize,
    k: usize,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { table, arithmetic, t, o, k } = self;
        write!(f, "@{} {arithmetic:?} T={t} O={o} K={k}", table.isa().name())
    }
}

/// Instruction sets by arithmetics by tokens by shapes.
fn cases(arithmetics: &[Arithmetic], tokens: &[usize], shapes: &[(usize, usize)]) -> Vec<Case> {
    let mut cases = Vec::new();
    for &table in Table::available() {
        for &arithmetic in arithmetics {
            for &t in tokens {
                cases.extend(shapes.iter().map(|&(o, k)| Case { table, arithmetic, t, o, k }));
            }
        }
    }
    cases
}

/// Another op on one instruction set, over `t` tokens.
struct Light {
    table: &'static Table,
    t: usize,
}

impl fmt::Display for Light {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "@{} T={}", self.table.isa().name(), self.t)
    }
}

fn light(tokens: &[usize]) -> Vec<Light> {
    Table::available().iter().flat_map(|&table| tokens.iter().map(move |&t| Light { table, t })).collect()
}

use Arithmetic::{Bf16, Exact, Int8};

#[divan::bench(args = cases(&[Exact, Int8], &[1], &[(1536, 576), (576, 1536), (8192, 2048)]))]
fn nf4_matvec(bencher: Bencher<'_, '_>, case: &Case) {
    product(bencher, case, nf4);
}

#[divan::bench(args = cases(&[Exact, Bf16, Int8], &[8, 256], &[(1536, 576), (576, 1536), (2048, 2048)]))]
fn nf4_matmul(bencher: Bencher<'_, '_>, case: &Case) {
    product(bencher, case, nf4);
}

#[divan::bench(args = cases(&[Exact, Bf16], &[8, 256], &[(1536, 576), (576, 1536), (2048, 2048)]))]
fn nf4_matmul_vjp_x(bencher: Bencher<'_, '_>, case: &Case) {
    let cpu = cpu(case.table);
    let (w, dy, mut dx) = (nf4(&cpu, case), noise(&cpu, case.t * case.o), noise(&cpu, case.t * case.k));
    bencher.counter(ItemsCount::new(2 * case.t * case.o * case.k)).bench_local(|| {
        cpu.run(Call::MatmulVjpX { arithmetic: case.arithmetic, terms: &[(&w, &dy)], dx: &mut dx, accumulate: false })
            .unwrap()
    });
}

#[divan::bench(args = cases(&[Exact], &[1, 64], &[(1536, 576), (16384, 576)]))]
fn f16_matmul(bencher: Bencher<'_, '_>, case: &Case) {
    product(bencher, case, |cpu, case| {
        let data = MatrixData::Dense(FloatType::F16, Bytes::from(vec![0x2c; case.o * case.k * 2]));
        cpu.matrix(MatrixSource { rows: case.o, cols: case.k, data }).unwrap()
    });
}

#[divan::bench(args = cases(&[Int8], &[1], &[(1536, 576), (16384, 576)]))]
fn int8_matvec(bencher: Bencher<'_, '_>, case: &Case) {
    product(bencher, case, |cpu, case| {
        let codes = (0..case.o * case.k).map(|i| (i * 31 % 255) as u8).collect();
        let scales = (0..case.o).flat_map(|_| 0.01f32.to_le_bytes()).collect();
        cpu.matrix(MatrixSource { rows: case.o, cols: case.k, data: MatrixData::Int8 { codes, scales } }).unwrap()
    });
}

/// One token of a product with an adapter of rank 16, in 8 bits.
#[divan::bench(args = cases(&[Int8], &[1], &[(1536, 576), (576, 1536), (8192, 2048)]))]
fn nf4_matvec_adapted(bencher: Bencher<'_, '_>, case: &Case) {
    let &Case { arithmetic, o, k, .. } = case;
    let cpu = cpu(case.table);
    let (w, a, b) = (nf4(&cpu, case), work(&cpu, 16, k), work(&cpu, o, 16));
    let (x, mut y) = (noise(&cpu, k), noise(&cpu, o));
    bencher.counter(ItemsCount::new(2 * o * k)).bench_local(|| {
        let low_rank = vec![LowRank { a: &a, b: &b, scale: 1.0, rows: ALL_ROWS }];
        cpu.run(Call::MatmulGroup { arithmetic, x: &x, products: &mut [Product { w: &w, low_rank, y: &mut y }] })
    });
}

fn product(bencher: Bencher<'_, '_>, case: &Case, weight: impl Fn(&Cpu, &Case) -> Matrix) {
    let cpu = cpu(case.table);
    let (w, x, mut y) = (weight(&cpu, case), noise(&cpu, case.t * case.k), noise(&cpu, case.t * case.o));
    bencher.counter(ItemsCount::new(2 * case.t * case.o * case.k)).counter(BytesCount::new(w.bytes())).bench_local(
        || cpu.run(Call::Matmul { arithmetic: case.arithmetic, w: &w, x: &x, y: &mut y, accumulate: false }).unwrap(),
    );
}

/// A layer `[1536, 576]`'s adapter of rank 8.
#[divan::bench(args = light(&[1, 256]))]
fn lora(bencher: Bencher<'_, '_>, Light { table, t }: &Light) {
    let cpu = cpu(table);
    let (a, b) = (work(&cpu, 8, 576), work(&cpu, 1536, 8));
    let (x, mut h, mut y) = (noise(&cpu, t * 576), noise(&cpu, t * 8), noise(&cpu, t * 1536));
    bencher.counter(ItemsCount::new(2 * t * 8 * (576 + 1536))).bench_local(|| {
        cpu.run(Call::Matmul { arithmetic: Exact, w: &a, x: &x, y: &mut h, accumulate: false }).unwrap();
        cpu.run(Call::Matmul { arithmetic: Exact, w: &b, x: &h, y: &mut y, accumulate: true }).unwrap();
    });
}

#[divan::bench(args = light(&[256]))]
fn lora_vjp(bencher: Bencher<'_, '_>, Light { table, t }: &Light) {
    let cpu = cpu(table);
    let (a, b) = (work(&cpu, 8, 576), work(&cpu, 1536, 8));
    let (x, h, y) = (noise(&cpu, t * 576), noise(&cpu, t * 8), noise(&cpu, t * 1536));
    let (mut dh, mut dx) = (noise(&cpu, t * 8), noise(&cpu, t * 576));
    let (mut da, mut db) = (noise(&cpu, 8 * 576), noise(&cpu, 1536 * 8));
    bencher.counter(ItemsCount::new(4 * t * 8 * (576 + 1536))).bench_local(|| {
        cpu.run(Call::MatmulVjpX { arithmetic: Exact, terms: &[(&b, &y)], dx: &mut dh, accumulate: false }).unwrap();
        cpu.run(Call::MatmulVjpX { arithmetic: Exact, terms: &[(&a, &dh)], dx: &mut dx, accumulate: true }).unwrap();
        cpu.run(Call::MatmulVjpW { tokens: *t, dy: &y, x: &h, dw: &mut db }).unwrap();
        cpu.run(Call::MatmulVjpW { tokens: *t, dy: &dh, x: &x, dw: &mut da }).unwrap();
    });
}

const HEADS: Attention = Attention { heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, softcap: None, window: None };

/// Half of T x T scores, two products.
#[divan::bench(args = light(&[256]))]
fn attention(bencher: Bencher<'_, '_>, Light { table, t }: &Light) {
    let cpu = cpu(table);
    let (q, k, v) = (noise(&cpu, t * 576), noise(&cpu, t * 192), noise(&cpu, t * 192));
    let (mut y, mut lse) = (noise(&cpu, t * 576), noise(&cpu, t * 9));
    bencher.counter(ItemsCount::new(2 * t * t * 576)).bench_local(|| {
        cpu.run(Call::Attention {
            spec: &HEADS,
            segments: &[*t],
            q: &q,
            k: &k,
            v: &v,
            sinks: None,
            y: &mut y,
            lse: &mut lse,
        })
        .unwrap()
    });
}

/// Half of T x T scores, five products.
#[divan::bench(args = light(&[256]))]
fn attention_vjp(bencher: Bencher<'_, '_>, Light { table, t }: &Light) {
    let cpu = cpu(table);
    let [q, y, dy, mut dq] = [0; 4].map(|_| noise(&cpu, t * 576));
    let [k, v, mut dk, mut dv] = [0; 4].map(|_| noise(&cpu, t * 192));
    let lse = noise(&cpu, t * 9);
    bencher.counter(ItemsCount::new(5 * t * t * 576)).bench_local(|| {
        cpu.run(Call::AttentionVjp {
            spec: &HEADS,
            segments: &[*t],
            q: &q,
            k: &k,
            v: &v,
            y: &y,
            lse: &lse,
            dy: &dy,
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        })
        .unwrap();
    });
}

/// One token over `T` cached ones.
#[divan::bench(args = light(&[1024]))]
fn attention_cached(bencher: Bencher<'_, '_>, Light { table, t }: &Light) {
    let cpu = cpu(table);
    let mut cache = cpu.cache(HEADS.kv_heads, HEADS.head_dim, CacheType::F16, None);
    let (k, v) = (noise(&cpu, t * 192), noise(&cpu, t * 192));
    cpu.run(Call::CacheAppend { cache: &mut cache, k: &k, v: &v, rows: 0..*t }).unwrap();
    let (q, mut y) = (noise(&cpu, 576), noise(&cpu, 576));
    bencher.counter(BytesCount::new(cache.bytes())).bench_local(|| {
        cpu.run(Call::AttentionCached { spec: &HEADS, q: &q, cache: &cache, sinks: None, y: &mut y, rows: 0..1 })
            .unwrap();
    });
}

/// The heads of Qwen3.5's smallest model.
const RULE: DeltaRule = DeltaRule { key_heads: 16, value_heads: 16, key_dim: 128, value_dim: 128 };

/// What a gated delta rule reads: `q`, `k`, `v`, `g`, `beta`.
fn rule_inputs(cpu: &Cpu, t: usize) -> [Buffer; 5] {
    [2048, 2048, 2048, 16, 16].map(|width| noise(cpu, t * width))
}

/// Three products with the state for each token.
#[divan::bench(args = light(&[1, 256]))]
fn delta_rule(bencher: Bencher<'_, '_>, Light { table, t }: &Light) {
    let (cpu, spec) = (cpu(table), &RULE);
    let (inputs, mut state, mut y) = (rule_inputs(&cpu, *t), noise(&cpu, spec.state_len()), noise(&cpu, t * 2048));
    let [q, k, v, g, beta] = &inputs;
    bencher.counter(ItemsCount::new(3 * t * spec.state_len())).bench_local(|| {
        let (state, y, rows) = (&mut state, &mut y, 0..*t);
        cpu.run(Call::DeltaRuleFrom { spec, q, k, v, g, beta, state, y, rows }).unwrap();
    });
}

/// Three products for states that are computed again, nearly twice, and seven for gradients.
#[divan::bench(args = light(&[256]))]
fn delta_rule_vjp(bencher: Bencher<'_, '_>, Light { table, t }: &Light) {
    let (cpu, spec, segments) = (cpu(table), &RULE, &[*t][..]);
    let (inputs, mut gradients, dy) = (rule_inputs(&cpu, *t), rule_inputs(&cpu, *t), &noise(&cpu, t * 2048));
    let [q, k, v, g, beta] = &inputs;
    bencher.counter(ItemsCount::new(13 * t * spec.state_len())).bench_local(|| {
        let [dq, dk, dv, dg, dbeta] = &mut gradients;
        let call = Call::DeltaRuleVjp { spec, segments, q, k, v, g, beta, dy, dq, dk, dv, dg, dbeta };
        cpu.run(call).unwrap();
    });
}

/// Four taps.
#[divan::bench(args = light(&[1, 256]))]
fn conv(bencher: Bencher<'_, '_>, Light { table, t }: &Light) {
    let cpu = cpu(table);
    let (w, x, mut y) = (noise(&cpu, 4 * 2048), noise(&cpu, t * 2048), noise(&cpu, t * 2048));
    bencher
        .counter(ItemsCount::new(4 * t * 2048))
        .bench_local(|| cpu.run(Call::Conv { w: &w, bias: None, segments: &[*t], x: &x, y: &mut y }).unwrap());
}

#[divan::bench(args = light(&[256]))]
fn swiglu(bencher: Bencher<'_, '_>, Light { table, t }: &Light) {
    let cpu = cpu(table);
    let (gate, up, mut y) = (noise(&cpu, t * 1536), noise(&cpu, t * 1536), noise(&cpu, t * 1536));
    bencher
        .counter(ItemsCount::new(t * 1536))
        .bench_local(|| cpu.run(Call::Gate { activation: Activation::Silu, gate: &gate, up: &up, y: &mut y }).unwrap());
}

#[divan::bench(args = light(&[16]))]
fn cross_entropy(bencher: Bencher<'_, '_>, Light { table, t }: &Light) {
    let cpu = cpu(table);
    let (targets, weights, mut logits, mut losses) =
        (vec![7; *t], vec![1.0; *t], noise(&cpu, t * 49152), noise(&cpu, *t));
    bencher.counter(ItemsCount::new(t * 49152)).bench_local(|| {
        cpu.run(Call::CrossEntropy {
            targets: Targets::of(&targets),
            weights: &weights,
            logits: &mut logits,
            losses: &mut losses,
        })
        .unwrap()
    });
}

fn cpu(table: &'static Table) -> Cpu {
    let threads = std::env::var("THREADS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    Cpu::with_table(threads, table)
}

fn noise(cpu: &Cpu, len: usize) -> Buffer {
    let mut buffer = cpu.buffer(len).unwrap();
    let values: Vec<f32> = (0..len).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0).collect();
    cpu.write(&mut buffer, &values);
    buffer
}

fn work(cpu: &Cpu, rows: usize, cols: usize) -> Matrix {
    let mut matrix = cpu.work_matrix(rows, cols, WorkType::F16).unwrap();
    cpu.set_matrix(&mut matrix, &noise(cpu, rows * cols));
    matrix
}

/// Double-quantized blocks of 64 in bf16, as most checkpoints have them.
fn nf4(cpu: &Cpu, &Case { o, k, .. }: &Case) -> Matrix {
    let (n, blocks) = (o * k, (o * k).div_ceil(64));
    let code = std::array::from_fn(|i| i as f32 / 7.5 - 1.0);
    let absmax = Absmax::Double {
        codes: (0..blocks).map(|i| i as u8).collect(),
        map: Arc::new(std::array::from_fn(|i| i as f32 / 127.5 - 1.0)),
        nested: vec![0.01; blocks.div_ceil(256)].into(),
        nested_block: 256,
        offset: 0.05,
    };
    let packed = (0..n / 2).map(|i| (i * 31) as u8).collect();
    let data = MatrixData::Nf4(Nf4Source { packed, block: 64, code, absmax, dtype: FloatType::BF16 });
    cpu.matrix(MatrixSource { rows: o, cols: k, data }).unwrap()
}
