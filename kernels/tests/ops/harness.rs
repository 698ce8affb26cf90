//! Runs a case on every table and thread count and reports all failures at once.

use pocketlora_kernels::Backend;
use pocketlora_kernels::cpu::{Buffer, Cpu, Table};
use std::sync::LazyLock;

/// Unit in the last place of 1 in f32.
pub const EPS: f64 = f32::EPSILON as f64;

/// One CPU per table, with one and with two threads.
static CPUS: LazyLock<Vec<[Cpu; 2]>> = LazyLock::new(|| {
    Table::available().iter().map(|table| [1, 2].map(|threads| Cpu::with_table(threads, table))).collect()
});

/// Expected values and how far off each may be.
pub struct Expected {
    pub values: Vec<f64>,
    pub bounds: Vec<f64>,
}

impl Expected {
    /// A bound for each element.
    pub fn new(values: Vec<f64>, bounds: Vec<f64>) -> Self {
        assert_eq!(values.len(), bounds.len());
        Self { values, bounds }
    }

    /// `relative` of each element and of the largest one times `EPS`.
    pub fn relative(values: Vec<f64>, relative: f64) -> Self {
        let largest = values.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        let bounds = values.iter().map(|v| relative * (v.abs() + largest * EPS) + 1e-37).collect();
        Self { values, bounds }
    }

    /// `factor` times the largest element: for sums whose terms are of that size.
    pub fn norm(values: Vec<f64>, factor: f64) -> Self {
        let largest = values.iter().fold(0.0_f64, |m, v| m.max(v.abs()));
        let bounds = vec![factor * largest + 1e-37; values.len()];
        Self { values, bounds }
    }
}

/// Collects failures; panics with all of them when dropped.
#[derive(Default)]
pub struct Report {
    failures: Vec<String>,
}

impl Report {
    /// `compute` returns the outputs that `expected` describes, in the same order.
    pub fn case(&mut self, name: &str, expected: &[Expected], compute: impl Fn(&Cpu) -> Vec<Vec<f32>> + Sync) {
        for [one, two] in CPUS.iter() {
            let isa = one.isa().name();
            let single = one.scope(|| compute(one));
            let double = two.scope(|| compute(two));
            assert_eq!(single.len(), expected.len(), "{name}: the case is written wrong");
            for (output, (got, want)) in single.iter().zip(expected).enumerate() {
                self.compare(&format!("{name} output {output} @{isa}"), got, want);
                let differs = got.iter().zip(&double[output]).position(|(a, b)| a.to_bits() != b.to_bits());
                if let Some(i) = differs {
                    let (a, b) = (got[i], double[output][i]);
                    self.fail(format!("{name} output {output} @{isa}[{i}]: {a} on 1 thread, {b} on 2"));
                }
            }
        }
    }

    fn compare(&mut self, name: &str, got: &[f32], want: &Expected) {
        if got.len() != want.values.len() {
            return self.fail(format!("{name}: {} values, expected {}", got.len(), want.values.len()));
        }
        for (i, got) in got.iter().enumerate() {
            let (value, bound) = (want.values[i], want.bounds[i]);
            let same = (value.is_nan() && got.is_nan()) || f64::from(*got) == value;
            let error = (f64::from(*got) - value).abs();
            // A NaN error is a failure, too.
            if !same && (error.is_nan() || error > bound) {
                // The first one tells enough; a wrong kernel is usually wrong everywhere.
                return self.fail(format!("{name}[{i}]: got {got:e}, expected {value:e}, bound {bound:e}"));
            }
        }
    }

    pub fn fail(&mut self, message: String) {
        self.failures.push(message);
    }
}

impl Drop for Report {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.failures.is_empty(), "{} failures:\n{}", self.failures.len(), self.failures.join("\n"));
        }
    }
}

/// A buffer with these values.
pub fn buffer(cpu: &Cpu, values: &[f32]) -> Buffer {
    let mut buffer = cpu.buffer(values.len()).unwrap();
    cpu.write(&mut buffer, values);
    buffer
}

/// A buffer of NaN: an op that does not overwrite all of its output shows.
pub fn poisoned(cpu: &Cpu, len: usize) -> Buffer {
    buffer(cpu, &vec![f32::NAN; len])
}

pub fn read(cpu: &Cpu, buffer: &Buffer) -> Vec<f32> {
    let mut values = vec![0.0; cpu.len(buffer)];
    cpu.read(buffer, &mut values).unwrap();
    values
}

/// Numbers that look random and are the same everywhere (SplitMix64, Steele et al. 2014).
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `[-1, 1)`.
    pub fn uniform(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1_u64 << 23) as f32 - 1.0
    }

    pub fn vector(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.uniform()).collect()
    }
}

/// In f64, as the oracles take them.
pub fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v)).collect()
}
