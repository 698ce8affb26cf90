//! Runs a case on every device, table and thread count and reports all failures at once.

use pocketlora_kernels::cpu::{Cpu, Isa, Table};
use pocketlora_kernels::{Arithmetic, Backend, Call, MatrixSource, doubles};
use std::sync::LazyLock;

/// Unit in the last place of 1 in f32.
pub const EPS: f64 = f32::EPSILON as f64;

/// One CPU per table, with one and with two threads.
static CPUS: LazyLock<Vec<[Cpu; 2]>> = LazyLock::new(|| {
    let tables = Table::available().iter().filter(|table| tested(table.isa().name()));
    tables.map(|table| [1, 2].map(|threads| Cpu::with_table(threads, table))).collect()
});

/// Instruction sets and devices that `POCKETLORA_TEST_ON` names, separated by commas; all where it is not set. What was
/// tested elsewhere need not be tested again.
pub fn test_on() -> Option<Vec<String>> {
    std::env::var("POCKETLORA_TEST_ON").ok().map(|list| list.split(',').map(|item| item.trim().to_owned()).collect())
}

fn tested(name: &str) -> bool {
    test_on().is_none_or(|list| list.iter().any(|item| item == name))
}

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

/// Adds a case to a [`Report`]: `case!(report, name, expected, |device| outputs)`. The body is compiled for every
/// backend and returns the outputs that `expected` describes, in the same order.
macro_rules! case {
    ($report:expr, $name:expr, $expected:expr, |$device:ident| $body:expr $(,)?) => {{
        let (name, expected): (&str, &[Expected]) = ($name, $expected);
        $report.cpus(name, expected, |$device: &pocketlora_kernels::Cpu| $body);
        #[cfg(feature = "vulkan")]
        $report.vulkan(name, expected, |$device: &pocketlora_kernels::Vulkan| $body);
    }};
}
pub(crate) use case;

/// Collects failures; panics with all of them when dropped.
#[derive(Default)]
pub struct Report {
    failures: Vec<String>,
}

impl Report {
    /// See [`case!`].
    pub fn cpus(&mut self, name: &str, expected: &[Expected], compute: impl Fn(&Cpu) -> Vec<Vec<f32>> + Sync) {
        self.cpus_by(name, |_| expected, compute);
    }

    /// As [`Report::cpus`] where instruction sets round differently.
    pub fn cpus_by<'a>(
        &mut self,
        name: &str,
        expected: impl Fn(Isa) -> &'a [Expected],
        compute: impl Fn(&Cpu) -> Vec<Vec<f32>> + Sync,
    ) {
        for [one, two] in CPUS.iter() {
            let outputs = [compute(one), compute(two)];
            let (isa, expected) = (one.isa(), expected(one.isa()));
            self.outputs(&format!("{name} @{}", isa.name()), expected, outputs, "on 1 thread, on 2");
        }
    }

    /// See [`case!`].
    #[cfg(feature = "vulkan")]
    pub fn vulkan(
        &mut self,
        name: &str,
        expected: &[Expected],
        compute: impl Fn(&pocketlora_kernels::Vulkan) -> Vec<Vec<f32>> + Sync,
    ) {
        static VULKAN: LazyLock<Option<pocketlora_kernels::Vulkan>> =
            LazyLock::new(|| if tested("vulkan") { new_vulkan() } else { None });
        let Some(device) = &*VULKAN else { return };
        let outputs = [compute(device), compute(device)];
        self.outputs(&format!("{name} @vulkan"), expected, outputs, "at first, then");
        for error in device.validation().iter().flat_map(|validation| validation.errors()) {
            self.fail(format!("{name} @vulkan or a case at the same time: {error}"));
        }
    }

    /// The first run must meet `expected`, the second must be the same bits.
    fn outputs(&mut self, name: &str, expected: &[Expected], [first, second]: [Vec<Vec<f32>>; 2], runs: &str) {
        assert_eq!(first.len(), expected.len(), "{name}: the case is written wrong");
        for (output, (got, want)) in first.iter().zip(expected).enumerate() {
            let name = format!("{name} output {output}");
            self.compare(&name, got, want);
            let again = &second[output];
            // Miri gives each NaN other bits, as the language allows.
            let same = |a: &f32, b: &f32| a.to_bits() == b.to_bits() || cfg!(miri) && a.is_nan() && b.is_nan();
            if let Some(i) = got.iter().zip(again).position(|(a, b)| !same(a, b)) {
                self.fail(format!("{name}[{i}]: not the same {runs}: {}, {}", got[i], again[i]));
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

/// Whether a case of about `work` multiplications is small enough for Miri, which is some thousand times slower. Others
/// take everything.
pub fn affordable(work: usize) -> bool {
    !cfg!(miri) || work <= 400
}

/// Whether `POCKETLORA_REQUIRE` (a comma-separated list) forbids to skip `what`.
pub fn required(what: &str) -> bool {
    std::env::var("POCKETLORA_REQUIRE").is_ok_and(|list| list.split(',').any(|item| item.trim() == what))
}

/// A device of its own, or `None` with a notice where there is none and may be none.
#[cfg(feature = "vulkan")]
pub fn new_vulkan() -> Option<pocketlora_kernels::Vulkan> {
    use std::io::Write as _;
    match pocketlora_kernels::Vulkan::new(2) {
        Ok(device) => Some(device),
        Err(why) => {
            assert!(!required("vulkan"), "POCKETLORA_REQUIRE has `vulkan`, but there is no device: {why}");
            // Not `eprintln!`, which the test harness swallows when a test passes.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no Vulkan device: {why}");
            None
        }
    }
}

/// A buffer with these values.
pub fn buffer<B: Backend>(device: &B, values: &[f32]) -> B::Buffer {
    let mut buffer = device.buffer(values.len()).unwrap();
    device.write(&mut buffer, values);
    buffer
}

/// A buffer of NaN: an op that does not overwrite all of its output shows.
pub fn poisoned<B: Backend>(device: &B, len: usize) -> B::Buffer {
    place(device, len, false)
}

pub fn read<B: Backend>(device: &B, buffer: &B::Buffer) -> Vec<f32> {
    let mut values = vec![0.0; device.len(buffer)];
    device.read(buffer, &mut values).unwrap();
    values
}

/// Where a result is to be: ones to be added to, or NaN to be overwritten.
fn place<B: Backend>(device: &B, len: usize, accumulate: bool) -> B::Buffer {
    buffer(device, &vec![if accumulate { 1.0 } else { f32::NAN }; len])
}

/// `x Wᵀ`, on top of ones if it is to `accumulate`.
pub fn product<B: Backend>(device: &B, arithmetic: Arithmetic, w: &B::Matrix, x: &[f32], accumulate: bool) -> Vec<f32> {
    let (rows, cols) = device.shape(w);
    let mut y = place(device, x.len() / cols * rows, accumulate);
    device.run(Call::Matmul { arithmetic, w, x: &buffer(device, x), y: &mut y, accumulate }).unwrap();
    read(device, &y)
}

/// [`product`] with the matrix that `source` describes.
pub fn product_of<B: Backend>(device: &B, arithmetic: Arithmetic, source: &MatrixSource, x: &[f32]) -> Vec<f32> {
    product(device, arithmetic, &device.matrix(source.clone()).unwrap(), x, false)
}

/// The sum of `dy W` over `terms` for so many tokens, on top of ones if it is to `accumulate`.
pub fn gradient_x<B: Backend>(
    device: &B,
    arithmetic: Arithmetic,
    terms: &[(&B::Matrix, &[f32])],
    tokens: usize,
    accumulate: bool,
) -> Vec<f32> {
    let mut dx = place(device, tokens * device.shape(terms[0].0).1, accumulate);
    let held: Vec<_> = terms.iter().map(|(w, dy)| (*w, buffer(device, dy))).collect();
    let terms: Vec<_> = held.iter().map(|(w, dy)| (*w, dy)).collect();
    device.run(Call::MatmulVjpX { arithmetic, terms: &terms, dx: &mut dx, accumulate }).unwrap();
    read(device, &dx)
}

/// The sum of squares of `x`, by the device.
pub fn sum_squares<B: Backend>(device: &B, x: &B::Buffer) -> f64 {
    let mut y = buffer(device, &[0.0; 4]);
    // Twice, for it adds to what is there, and to nothing else.
    for _ in 0..2 {
        device.run(Call::SumSquares { x, at: 1, y: &mut y }).unwrap();
    }
    let [other, twice] = doubles(&read(device, &y))[..] else { panic!("two numbers") };
    assert_eq!(other, 0.0);
    twice / 2.0
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
