//! Speed of the ops that dominate time, on every instruction set of this CPU.
//!
//! `cargo bench -p pocketlora-kernels --bench ops -- [THREADS] [NAME@ISA]` runs those whose name holds the given part; without `--bench` (as `cargo test --benches` runs it) every
//! op runs once. Figures are the best of several runs: other processes only ever add time.

use bytes::Bytes;
use pocketlora_kernels::cpu::{Buffer, Cpu, Matrix, Table};
use pocketlora_kernels::{
    Absmax, Arithmetic, Attention, Backend, CacheType, FloatType, MatrixData, MatrixSource, Nf4Source, WorkType,
};
use std::sync::Arc;
use std::time::Instant;

fn main() {
    let measured = std::env::args().any(|arg| arg == "--bench");
    let threads = std::env::args().skip(1).find_map(|arg| arg.parse().ok()).unwrap_or(1);
    let wanted = std::env::args().skip(1).find(|arg| !arg.starts_with('-') && arg.parse::<usize>().is_err());
    for table in Table::available() {
        let bench = Bench { cpu: Cpu::with_table(threads, table), measured, wanted: wanted.clone() };
        println!("{} on {threads} threads", table.isa().name());
        bench.run();
    }
}

struct Bench {
    cpu: Cpu,
    measured: bool,
    wanted: Option<String>,
}

impl Bench {
    fn run(&self) {
        let cpu = &self.cpu;
        for (o, k) in [(1536, 576), (576, 1536), (2048, 2048)] {
            let w = self.nf4(o, k);
            for t in [8, 256] {
                let (x, dy) = (self.noise(t * k), self.noise(t * o));
                let (mut y, mut dx) = (self.noise(t * o), self.noise(t * k));
                let work = 2.0 * (t * o * k) as f64;
                let shape = format!("T={t} O={o} K={k}");
                self.time(&format!("nf4_matmul {shape}"), work, "GFLOP/s", || {
                    cpu.matmul(Arithmetic::Exact, &w, &x, &mut y, false)
                });
                let name = format!("nf4_matmul_vjp_x {shape}");
                self.time(&name, work, "GFLOP/s", || cpu.matmul_vjp_x(Arithmetic::Exact, &w, &dy, &mut dx, false));
            }
        }
        for (o, k) in [(1536, 576), (576, 1536), (8192, 2048)] {
            let (w, x, mut y) = (self.nf4(o, k), self.noise(k), self.noise(o));
            let name = format!("nf4_matvec O={o} K={k}");
            self.time(&name, (o * k) as f64, "Gweights/s", || cpu.matmul(Arithmetic::Exact, &w, &x, &mut y, false));
        }
        for (o, k) in [(1536, 576), (49152, 576)] {
            let data = MatrixData::Dense(FloatType::F16, Bytes::from(vec![0x2c; o * k * 2]));
            let w = cpu.matrix(MatrixSource { rows: o, cols: k, data }).unwrap();
            let (x, mut y) = (self.noise(k), self.noise(o));
            let name = format!("f16_matvec O={o} K={k}");
            self.time(&name, (o * k * 2) as f64, "GB/s", || cpu.matmul(Arithmetic::Exact, &w, &x, &mut y, false));
        }

        for t in [1, 256] {
            let (a, b) = (self.work(8, 576), self.work(1536, 8));
            let (x, mut h, mut y) = (self.noise(t * 576), self.noise(t * 8), self.noise(t * 1536));
            let (mut dh, mut dx) = (self.noise(t * 8), self.noise(t * 576));
            let (mut da, mut db) = (self.noise(8 * 576), self.noise(1536 * 8));
            let work = 2.0 * (t * 8 * (576 + 1536)) as f64;
            self.time(&format!("lora forward T={t}"), work, "GFLOP/s", || {
                cpu.matmul(Arithmetic::Exact, &a, &x, &mut h, false);
                cpu.matmul(Arithmetic::Exact, &b, &h, &mut y, true);
            });
            self.time(&format!("lora vjp T={t}"), 2.0 * work, "GFLOP/s", || {
                cpu.matmul_vjp_x(Arithmetic::Exact, &b, &y, &mut dh, false);
                cpu.matmul_vjp_x(Arithmetic::Exact, &a, &dh, &mut dx, true);
                cpu.matmul_vjp_w(t, &y, &h, &mut db);
                cpu.matmul_vjp_w(t, &dh, &x, &mut da);
            });
        }
        self.attention();
        let (t, c) = (256, 1536);
        let (gate, up, mut y) = (self.noise(t * c), self.noise(t * c), self.noise(t * c));
        self.time("swiglu T=256 C=1536", (t * c) as f64, "Gelements/s", || cpu.swiglu(&gate, &up, &mut y));
        let mut logits = self.noise(16 * 49152);
        let mut losses = self.noise(16);
        self.time("cross_entropy [16, 49152]", (16 * 49152) as f64, "Gelements/s", || {
            cpu.cross_entropy(&[7; 16], 1.0, &mut logits, &mut losses);
        });
    }

    fn attention(&self) {
        let cpu = &self.cpu;
        let (t, spec) = (256, Attention { heads: 9, kv_heads: 3, head_dim: 64, scale: 0.125, window: None });
        let [q, mut y, dy, mut dq] = [0; 4].map(|_| self.noise(t * 576));
        let [k, v, mut dk, mut dv] = [0; 4].map(|_| self.noise(t * 192));
        let mut lse = self.noise(t * 9);
        // Half of T x T, two products forward and five backward.
        let product = (t * t * 576) as f64;
        self.time("attention T=256 H=9 G=3 D=64", 2.0 * product, "GFLOP/s", || {
            cpu.attention(&spec, &[t], &q, &k, &v, &mut y, &mut lse);
        });
        self.time("attention_vjp T=256 H=9 G=3 D=64", 5.0 * product, "GFLOP/s", || {
            cpu.attention_vjp(&spec, &[t], &q, &k, &v, &y, &lse, &dy, &mut dq, &mut dk, &mut dv);
        });
        let mut cache = cpu.cache(3, 64, CacheType::F16);
        for _ in 0..4 {
            cpu.cache_append(&mut cache, &k, &v).unwrap();
        }
        let (q, mut y) = (self.noise(576), self.noise(576));
        self.time("attention_cached T=1 of 1024", (1024 * 192 * 4) as f64, "GB/s", || {
            cpu.attention_cached(&spec, &q, &cache, &mut y);
        });
    }

    /// Prints `work` a second at the best of some 0.2 s of runs.
    fn time(&self, name: &str, work: f64, unit: &str, mut op: impl FnMut() + Send) {
        let name = format!("{name} @{}", self.cpu.isa().name());
        if self.wanted.as_ref().is_some_and(|part| !name.contains(part)) {
            return;
        }
        let (start, mut best) = (Instant::now(), f64::INFINITY);
        self.cpu.scope(|| {
            while best.is_infinite() || self.measured && start.elapsed().as_secs_f64() < 0.2 {
                let before = Instant::now();
                op();
                best = best.min(before.elapsed().as_secs_f64());
            }
        });
        println!("  {name:50} {:9.2} us {:8.2} {unit}", best * 1e6, work / best / 1e9);
    }

    fn noise(&self, len: usize) -> Buffer {
        let mut buffer = self.cpu.buffer(len).unwrap();
        let values: Vec<f32> = (0..len).map(|i| ((i * 37 + 11) % 101) as f32 / 50.0 - 1.0).collect();
        self.cpu.write(&mut buffer, &values);
        buffer
    }

    fn work(&self, rows: usize, cols: usize) -> Matrix {
        let mut matrix = self.cpu.work_matrix(rows, cols, WorkType::F16).unwrap();
        self.cpu.set_matrix(&mut matrix, &self.noise(rows * cols));
        matrix
    }

    /// Double-quantized blocks of 64 in bf16, as most checkpoints have them.
    fn nf4(&self, rows: usize, cols: usize) -> Matrix {
        let (n, blocks) = (rows * cols, (rows * cols).div_ceil(64));
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
        self.cpu.matrix(MatrixSource { rows, cols, data }).unwrap()
    }
}
