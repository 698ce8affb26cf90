//! What this machine could do at best: the rates against which kernels are judged.
//!
//! Each peak is a loop of one instruction on registers, with enough independent sums to fill the pipeline; reading is
//! one sequential stream per thread over memory that no cache holds. A limit is the best of several tries of every
//! instruction set that this CPU has, whatever `POCKETLORA_ISA` says: other programs can only take away from it.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;

use crate::Error;
use memmap2::MmapMut;
use std::sync::{Barrier, LazyLock};
use std::time::{Duration, Instant};

/// The machine's best rates on a number of threads.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Limits {
    /// Bytes a second from memory, in 1e9.
    pub read_gb_s: f64,
    /// Multiplications and additions of f32 a second, in 1e9.
    pub f32_gflops: f64,
    /// The same of 8-bit integers with 32-bit sums.
    pub int8_gops: f64,
    /// The same of bf16 with f32 sums; `None` where the CPU has no instruction for it that is faster than f32's.
    pub bf16_gflops: Option<f64>,
}

impl Limits {
    /// Of two measurements the higher rates, for neither can be too high.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self {
            read_gb_s: self.read_gb_s.max(other.read_gb_s),
            f32_gflops: self.f32_gflops.max(other.f32_gflops),
            int8_gops: self.int8_gops.max(other.int8_gops),
            bf16_gflops: self.bf16_gflops.into_iter().chain(other.bf16_gflops).reduce(f64::max),
        }
    }
}

/// A loop on registers.
struct Peak {
    /// Runs so many rounds and returns something that depends on all of them.
    run: unsafe fn(usize) -> f32,
    /// Multiplications and additions of a round.
    ops: u64,
}

/// What one instruction set has for each limit.
struct Probes {
    /// Reads all bytes; returns something that depends on them.
    read: Option<unsafe fn(&[u8]) -> u64>,
    f32: Option<Peak>,
    int8: Option<Peak>,
    bf16: Option<Peak>,
}

const NONE: Probes = Probes { read: None, f32: None, int8: None, bf16: None };

/// The probes that this CPU can run: as in `table.rs`, nothing else hands them out.
static AVAILABLE: LazyLock<Vec<&'static Probes>> = LazyLock::new(|| {
    let mut probes = vec![&portable::PROBES];
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            probes.extend([&avx2::AVX2, &avx2::AVX2_KEEP]);
        }
        if is_x86_feature_detected!("avxvnni") && is_x86_feature_detected!("avx2") {
            probes.push(&avx2::AVX_VNNI);
        }
        if is_x86_feature_detected!("avx512f") {
            probes.extend([&avx512::AVX512, &avx512::AVX512_KEEP]);
            if is_x86_feature_detected!("avx512vnni") {
                probes.push(&avx512::VNNI);
            }
            if is_x86_feature_detected!("avx512bf16") {
                probes.push(&avx512::BF16);
            }
            if super::amx::available() {
                probes.push(&amx::AMX);
            }
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        use std::arch::is_aarch64_feature_detected;
        probes.push(&neon::NEON);
        if is_aarch64_feature_detected!("dotprod") {
            probes.push(&neon::DOTPROD);
        }
        if is_aarch64_feature_detected!("i8mm") {
            probes.push(&neon::I8MM);
        }
        if is_aarch64_feature_detected!("bf16") {
            probes.push(&neon::BF16_DOT);
            probes.push(&neon::BF16_MATRIX);
        }
    }
    probes
});

/// Length of one try of a peak: many times what starting the threads takes, short against a scheduler's patience.
const BURST: Duration = Duration::from_millis(15);
/// Memory read in one try: several times the largest cache of client and of most server processors, or of phones.
const READ_BYTES: usize = if cfg!(any(target_os = "android", target_os = "ios")) { 96 << 20 } else { 512 << 20 };
/// Times the memory is read in a row in one try.
const PASSES: usize = 2;

/// Measures on `threads` threads, all cores if 0, the best of `tries`. Five of them take two seconds; the memory that is
/// read (half a gigabyte, less on phones) is freed afterwards.
///
/// # Errors
/// [`Error::OutOfMemory`] for the memory to be read.
pub fn measure(threads: usize, tries: usize) -> Result<Limits, Error> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = if threads == 0 { cores() } else { threads };
    let best = |of: fn(&Probes) -> Option<&Peak>| {
        AVAILABLE.iter().filter_map(|p| of(p)).map(|peak| rate_of(peak, threads, tries)).reduce(f64::max)
    };
    let both = "the portable probes have it";
    let f32_gflops = best(|p| p.f32.as_ref()).expect(both);
    Ok(Limits {
        read_gb_s: read_rate(threads, tries)?,
        f32_gflops,
        int8_gops: best(|p| p.int8.as_ref()).expect(both),
        bf16_gflops: best(|p| p.bf16.as_ref()).filter(|&rate| rate > f32_gflops),
    })
}

/// 1e9 operations a second of `peak` on `threads` threads.
fn rate_of(peak: &Peak, threads: usize, tries: usize) -> f64 {
    let run = |rounds| {
        // SAFETY: `AVAILABLE` hands out only probes that this CPU runs, and they touch no memory.
        #[allow(unsafe_code, reason = "entry wrapper of the table of probes")]
        let result = unsafe { (peak.run)(rounds) };
        std::hint::black_box(result);
    };
    let mut rounds = 1024;
    while together(1, |_| run(rounds)) < BURST {
        rounds *= 2;
    }
    let best = (0..tries.max(1)).map(|_| together(threads, |_| run(rounds))).min();
    let ops = peak.ops * (rounds * threads) as u64;
    ops as f64 / best.map_or(f64::INFINITY, |t| t.as_secs_f64()) / 1e9
}

/// 1e9 bytes a second from memory on `threads` threads.
fn read_rate(threads: usize, tries: usize) -> Result<f64, Error> {
    let mut memory = MmapMut::map_anon(READ_BYTES).map_err(|_| Error::OutOfMemory { bytes: READ_BYTES })?;
    // In large pages, as weights are mapped: a core reads small ones more slowly.
    #[cfg(target_os = "linux")]
    memory.advise(memmap2::Advice::HugePage).ok();
    // Ones, for pages of zeros may be one and the same page.
    memory.fill(1);
    let share = (READ_BYTES / threads).next_multiple_of(4096);
    let readers = AVAILABLE.iter().filter_map(|p| p.read);
    let rate = readers.map(|read| {
        let time = || {
            together(threads, |i| {
                let part = &memory[(i * share).min(READ_BYTES)..((i + 1) * share).min(READ_BYTES)];
                for _ in 0..PASSES {
                    // SAFETY: `AVAILABLE` hands out only probes that this CPU runs; they stay within the slice.
                    #[allow(unsafe_code, reason = "entry wrapper of the table of probes")]
                    let sum = unsafe { read(part) };
                    std::hint::black_box(sum);
                }
            })
        };
        let best = (0..tries.max(1)).map(|_| time()).min();
        (PASSES * READ_BYTES) as f64 / best.map_or(f64::INFINITY, |t| t.as_secs_f64()) / 1e9
    });
    Ok(rate.fold(0.0, f64::max))
}

/// Time from the common start of `work(i)` on `threads` threads until the last of them is done.
fn together(threads: usize, work: impl Fn(usize) + Sync) -> Duration {
    let barrier = Barrier::new(threads);
    let timed = |i: usize| {
        barrier.wait();
        let start = Instant::now();
        work(i);
        (start, Instant::now())
    };
    let spans = std::thread::scope(|s| {
        let others: Vec<_> = (1..threads)
            .map(|i| {
                s.spawn({
                    let timed = &timed;
                    move || timed(i)
                })
            })
            .collect();
        let mut spans = vec![timed(0)];
        spans.extend(others.into_iter().filter_map(|thread| thread.join().ok()));
        spans
    });
    let start = spans.iter().map(|span| span.0).min();
    let end = spans.iter().map(|span| span.1).max();
    start.zip(end).map_or(Duration::ZERO, |(start, end)| end - start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_probe_reads_all_bytes_and_runs() {
        // A length with a tail, and a flipped bit at each end that the sum must see.
        for read in AVAILABLE.iter().filter_map(|p| p.read) {
            let call = |bytes: &[u8]| {
                // SAFETY: `AVAILABLE` hands out only probes that this CPU runs; they stay within the slice.
                #[allow(unsafe_code, reason = "the entry under test")]
                unsafe {
                    read(bytes)
                }
            };
            let mut bytes = vec![1u8; 4096 + 13];
            let plain = call(&bytes);
            for at in [0, 63, 64, 4095, 4096, 4108] {
                bytes[at] ^= 8;
                assert_ne!(call(&bytes), plain, "byte {at} was not read");
                bytes[at] ^= 8;
            }
            assert_eq!(call(&[]), 0);
        }
    }

    #[test]
    #[cfg_attr(miri, ignore = "measures time")]
    fn the_limits_are_rates() {
        let one = measure(1, 1).unwrap();
        let all = [one.read_gb_s, one.f32_gflops, one.int8_gops, one.bf16_gflops.unwrap_or(1.0)];
        assert!(all.iter().all(|rate| rate.is_finite() && *rate > 1e-3), "{one:?}");
        assert_eq!(one.max(Limits { read_gb_s: 0.0, bf16_gflops: None, ..one }), one);
    }
}
