//! What Vulkan has beside the operations: work that is recorded, and waits for it.

use super::harness::{EPS, Expected, Random, Report, buffer, case, new_vulkan, poisoned, read, wide};
use super::oracle;
use super::weights::{self, KINDS};
use pocketlora_kernels::{
    Absmax, Arithmetic, Backend, Call, Error, FloatType, MatrixData, MatrixSource, Memory, Nf4Source, Vulkan,
};

/// Runs `test` on a device of its own, whose counters nobody else moves, and destroys it; asks the validation layers
/// afterwards whether all was well, if they are on.
fn alone(test: impl FnOnce(&Vulkan)) {
    let Some(device) = new_vulkan() else { return };
    let validation = device.validation();
    test(&device);
    drop(device);
    let errors = validation.map_or_else(Vec::new, |validation| validation.errors());
    assert!(errors.is_empty(), "{} complaints of the validation layers:\n{}", errors.len(), errors.join("\n"));
}

// Width, width of keys and values, inner width: those of SmolLM2-135M.
const C: usize = 576;
const KV: usize = 192;
const INNER: usize = 1536;

/// The weights of a block without attention, and what they stand for.
struct Block {
    norms: [Vec<f32>; 2],
    /// q, k, v, o, gate, up, down.
    weights: Vec<(MatrixSource, Vec<f32>)>,
}

impl Block {
    fn random(random: &mut Random) -> Self {
        let shapes = [[C, C], [KV, C], [KV, C], [C, C], [INNER, C], [INNER, C], [C, INNER]];
        // Double quantization with f32, with bf16, and with f16 in blocks of 32, in turn.
        let kinds = [KINDS[3], KINDS[4], KINDS[6]].into_iter().cycle();
        let weights = shapes.iter().zip(kinds).map(|([o, k], kind)| weights::random(random, kind, *o, *k)).collect();
        Self { norms: [0; 2].map(|_| random.vector(C)), weights }
    }

    /// A block's calls for one token, without attention and with a sum in the place of SwiGLU: keys, values and output.
    fn run<B: Backend>(&self, device: &B, x: &[f32]) -> [B::Buffer; 3] {
        let matmul = |w: usize, x: &B::Buffer| {
            // Dropped before the device gets to it, as the inputs below are.
            let w = device.matrix(self.weights[w].0.clone()).unwrap();
            let mut y = poisoned(device, device.shape(&w).0);
            device.run(Call::Matmul { arithmetic: Arithmetic::Exact, w: &w, x, y: &mut y, accumulate: false }).unwrap();
            y
        };
        let add = |a: &B::Buffer, b: &B::Buffer| {
            let mut y = poisoned(device, device.len(a));
            device.run(Call::Add { a, b, y: &mut y }).unwrap();
            y
        };
        let norm = |w: usize, x: &B::Buffer| {
            let mut y = poisoned(device, C);
            device
                .run(Call::RmsNorm {
                    width: device.len(&buffer(device, &self.norms[w])),
                    w: Some(&buffer(device, &self.norms[w])),
                    plus_one: false,
                    eps: 1e-5,
                    x,
                    y: &mut y,
                })
                .unwrap();
            y
        };
        let x = buffer(device, x);
        let h = norm(0, &x);
        let (q, k, v) = (matmul(0, &h), matmul(1, &h), matmul(2, &h));
        let x = add(&x, &matmul(3, &q));
        let h = norm(1, &x);
        let mid = add(&matmul(4, &h), &matmul(5, &h));
        [k, v, add(&x, &matmul(6, &mid))]
    }

    /// The same in f64.
    fn oracle(&self, x: &[f32]) -> [Vec<f64>; 3] {
        let matmul = |w: usize, x: &[f64]| oracle::matmul(x, &wide(&self.weights[w].1), x.len()).0;
        let add = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>();
        let norm = |w: usize, x: &[f64]| oracle::rms_norm(&wide(&self.norms[w]), f64::from(1e-5_f32), x);
        let x = wide(x);
        let h = norm(0, &x);
        let (q, k, v) = (matmul(0, &h), matmul(1, &h), matmul(2, &h));
        let x = add(&x, &matmul(3, &q));
        let h = norm(1, &x);
        let mid = add(&matmul(4, &h), &matmul(5, &h));
        [k, v, add(&x, &matmul(6, &mid))]
    }
}

#[test]
fn a_block_is_recorded_without_a_wait() {
    let mut random = Random(41);
    let (block, x) = (Block::random(&mut random), random.vector(C));
    // Three products in a row, each a sum of up to 1536 terms, of values of the outputs' size.
    let expected = block.oracle(&x).map(|values| Expected::norm(values, 256.0 * EPS));
    let mut report = Report::default();
    case!(report, "a block without attention", &expected, |device| {
        block.run(device, &x).map(|y| read(device, &y)).into()
    });
    alone(|device| {
        let outputs = block.run(device, &x);
        // Two norms, seven products, three sums; on the CPU there would be nothing to wait for either.
        assert_eq!((device.recorded(), device.waits()), (12, 0));
        let [_, _, y] = outputs.map(|y| read(device, &y));
        assert_eq!((device.recorded(), device.waits()), (12, 1), "the first read waits for all there is");
        assert!(y.iter().zip(&expected[2].values).all(|(y, want)| (f64::from(*y) - want).abs() < 1e-2), "{y:?}");
    });
}

#[test]
fn only_what_touches_recorded_work_waits() {
    alone(|device| {
        let mut a = buffer(device, &[1.0, 2.0]);
        let mut y = poisoned(device, 2);
        device.run(Call::Add { a: &a, b: &a, y: &mut y }).unwrap();
        assert_eq!(read(device, &a), [1.0, 2.0]);
        assert_eq!(device.waits(), 0, "reading what the device reads");
        device.write(&mut a, &[5.0, 6.0]);
        assert_eq!(device.waits(), 1, "writing what the device reads");
        assert_eq!(read(device, &y), [2.0, 4.0], "and it read the old values");
        assert_eq!(device.waits(), 1, "reading what is done");
        device.run(Call::AddAssign { x: &a, y: &mut y }).unwrap();
        device.run(Call::Scale { factor: 0.5, x: &mut a }).unwrap();
        assert_eq!(device.waits(), 2, "an operation without a shader on what the device reads");
        device.run(Call::AddAssign { x: &a, y: &mut y }).unwrap();
        device.run(Call::Scale { factor: 2.0, x: &mut y }).unwrap();
        assert_eq!(device.waits(), 3, "the same on what the device writes");
        assert_eq!((read(device, &y), device.recorded()), (vec![19.0, 26.0], 3));
    });
}

#[test]
fn dependent_work_is_done_in_order() {
    alone(|device| {
        // Fibonacci numbers, exact in f32: reads after writes, writes after reads and writes after writes, through
        // buffers that are dropped at once, and far more of it than fits a batch or all that may be in flight.
        let n = 1000;
        let one = buffer(device, &vec![1.0; n]);
        let (mut x, mut y) = (poisoned(device, n), poisoned(device, n));
        device.run(Call::Zero { x: &mut x }).unwrap();
        device.run(Call::Zero { x: &mut y }).unwrap();
        let mut want = [0.0_f32, 0.0];
        for step in 0..2000 {
            let mut sum = poisoned(device, n);
            device.run(Call::Add { a: &x, b: &y, y: &mut sum }).unwrap();
            device.run(Call::Zero { x: &mut x }).unwrap();
            if step % 16 == 0 {
                want = [0.0, 1.0];
                device.run(Call::Zero { x: &mut y }).unwrap();
                device.run(Call::AddAssign { x: &one, y: &mut y }).unwrap();
            } else {
                want = [want[1], want[0] + want[1]];
                device.run(Call::AddAssign { x: &y, y: &mut x }).unwrap();
                device.run(Call::Zero { x: &mut y }).unwrap();
                device.run(Call::AddAssign { x: &sum, y: &mut y }).unwrap();
            }
        }
        assert_eq!([&x, &y].map(|buffer| read(device, buffer)), want.map(|want| vec![want; n]));
    });
}

#[test]
fn threads_record_at_the_same_time() {
    alone(|device| {
        std::thread::scope(|scope| {
            for thread in 1..=4 {
                scope.spawn(move || {
                    let x = buffer(device, &[thread as f32; 100]);
                    let mut y = buffer(device, &[0.0; 100]);
                    for round in 1..=300 {
                        device.run(Call::AddAssign { x: &x, y: &mut y }).unwrap();
                        if round % 100 == 0 {
                            assert_eq!(read(device, &y), [(thread * round) as f32; 100]);
                        }
                    }
                });
            }
        });
    });
}

#[test]
fn memory_is_given_back_and_handed_out_once() {
    alone(|device| {
        let sizes: Vec<usize> = (0..20).map(|_| device.buffer(8 << 20).map(|b| device.len(&b)).unwrap()).collect();
        assert_eq!(sizes, [8 << 20; 20]);
        assert_eq!(device.allocated(), 0, "a large buffer is an allocation of its own, and goes with it");
        // Neighbours in a chunk, dropped in another order than they were made.
        let mut buffers: Vec<_> = (0..100).map(|i| buffer(device, &vec![i as f32; 1 + i * 37])).collect();
        for i in (0..50).rev() {
            buffers.remove(i * 2);
        }
        let more: Vec<_> = (0..60).map(|i| buffer(device, &vec![-1.0; 1 + i * 61])).collect();
        for (i, kept) in buffers.iter().enumerate() {
            assert!(read(device, kept).iter().all(|x| *x == (2 * i + 1) as f32));
        }
        assert!(more.iter().all(|buffer| read(device, buffer).iter().all(|x| *x == -1.0)));
        let one = device.allocated();
        assert!((1..=16 << 20).contains(&one), "{one} bytes for 600 KB of small buffers");
        drop((buffers, more));
        // Merged again: otherwise nothing of this size is left in the chunk.
        let _large_part = device.buffer((4 << 20) / 4).unwrap();
        assert_eq!(device.allocated(), one);
    });
    // A buffer may outlive what made it.
    let Some(device) = new_vulkan() else { return };
    let mut y = device.buffer(8).unwrap();
    device.run(Call::AddAssign { x: &buffer(&device, &[1.0; 8]), y: &mut y }).unwrap();
    drop(device);
    drop(y);
}

#[test]
fn memory_that_cannot_be_had_is_an_error_and_nothing_breaks() {
    alone(|device| {
        for len in [1 << 40, 1 << 60, usize::MAX] {
            assert!(matches!(device.buffer(len), Err(Error::OutOfMemory { .. })), "{len}");
        }
        assert_eq!(read(device, &buffer(device, &[3.0])), [3.0]);
    });
}

#[test]
fn sizes_beyond_a_dispatch_and_beyond_a_shader_are_right() {
    alone(|device| {
        let mut random = Random(42);
        // More work groups than the poorest device takes at once: 65535.
        let rows = 70_000;
        let (source, w) = weights::random(&mut random, KINDS[3], rows, 8);
        let x = random.vector(8);
        let mut y = poisoned(device, rows);
        device
            .run(Call::Matmul {
                arithmetic: Arithmetic::Exact,
                w: &device.matrix(source).unwrap(),
                x: &buffer(device, &x),
                y: &mut y,
                accumulate: false,
            })
            .unwrap();
        let want = oracle::matmul(&wide(&x), &wide(&w), 8).0;
        assert!(read(device, &y).iter().zip(want).all(|(y, want)| (f64::from(*y) - want).abs() < 64.0 * EPS));
        let column = random.vector(rows);
        device
            .run(Call::RmsNorm {
                width: device.len(&buffer(device, &[0.5])),
                w: Some(&buffer(device, &[0.5])),
                plus_one: false,
                eps: 0.0,
                x: &buffer(device, &column),
                y: &mut y,
            })
            .unwrap();
        // Of a single element, a norm is its sign.
        assert!(read(device, &y).iter().zip(&column).all(|(y, x)| (y - 0.5 * x.signum()).abs() < 1e-6));
        // 5 million elements are more groups again; 128 MiB and a bit are more than the poorest device's shaders see.
        for len in [5_000_000, (32 << 20) + 1] {
            let mut y = buffer(device, &vec![1.5; len]);
            device.run(Call::AddAssign { x: &buffer(device, &vec![2.0; len]), y: &mut y }).unwrap();
            assert!(read(device, &y).iter().all(|y| *y == 3.5), "{len}");
        }
    });
}

/// A single weight a row, times one, shows what the shader dequantizes it to.
#[test]
fn the_shader_dequantizes_to_the_same_bits() {
    alone(|device| {
        let mut random = Random(43);
        // Sizes around every border of f16 (subnormal below 2^-14, nothing below 2^-25, infinity from 65520 on) and of
        // bf16 (infinity near the largest f32), and what is no number.
        let mut code: [f32; 16] = std::array::from_fn(|_| random.uniform());
        code[..8].copy_from_slice(&[1.0, -1.0, 0.0, 1.000_488_3, 1.001_464_8, 1.003_906_3, 1.011_718_8, -0.999_755_9]);
        let mut scales: Vec<f32> = (-32..=18).map(|e| 2.0_f32.powi(e)).collect();
        scales.extend((-40..=30).map(|e| 2.0_f32.powi(e / 2) * (1.5 + 0.4 * random.uniform())));
        scales.extend([65504.0, 65519.99, 65520.0, 65536.0, 3.39e38, f32::MAX, f32::INFINITY, f32::NAN]);
        let (block, rows) = (32, 32 * scales.len());
        let absmax: Vec<u8> = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
        let packed: Vec<u8> = (0..rows / 2).map(|_| random.bits() as u8).collect();
        for dtype in [FloatType::F32, FloatType::F16, FloatType::BF16] {
            let absmax = Absmax::Plain(absmax.clone().into());
            let source = Nf4Source { packed: packed.clone().into(), block, code, absmax, dtype };
            let mut want = vec![0.0; rows];
            source.decode(0, &mut want);
            let w = device.matrix(MatrixSource { rows, cols: 1, data: MatrixData::Nf4(source) }).unwrap();
            let mut y = poisoned(device, rows);
            device
                .run(Call::Matmul {
                    arithmetic: Arithmetic::Exact,
                    w: &w,
                    x: &buffer(device, &[1.0]),
                    y: &mut y,
                    accumulate: false,
                })
                .unwrap();
            for (i, (y, want)) in read(device, &y).iter().zip(&want).enumerate() {
                // The sum over a work group adds zeros, which takes the sign off a zero; f32's subnormals may be lost.
                let same = y == want || y.is_nan() && want.is_nan() || want.is_subnormal() && *y == 0.0;
                assert!(same, "{dtype:?} [{i}]: {y:e}, expected {want:e}, scale {:e}", scales[i / block]);
            }
        }
    });
}
