//! Products in 8 bits and in bf16, grouped products, and what they do with numbers that are none.

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, poisoned, read, wide};
use super::oracle;
use super::weights::{self, Kind};
use bytes::Bytes;
use pocketlora_kernels::cpu::Isa;
use pocketlora_kernels::quant::encode_int8;
use pocketlora_kernels::{
    ALL_ROWS, Absmax, Arithmetic, Backend, Call, FloatType, LowRank, MatrixData, MatrixSource, Memory, Nf4Source,
    Product, WorkType,
};

/// Weights with a fast path in 8 bits.
const KINDS: [Kind; 4] = [
    Kind::Nf4 { block: 64, double: true, dtype: FloatType::BF16 },
    Kind::Nf4 { block: 64, double: false, dtype: FloatType::F32 },
    Kind::Nf4 { block: 128, double: true, dtype: FloatType::F16 },
    Kind::Nf4 { block: 4096, double: true, dtype: FloatType::F32 },
];

/// `[T, O, K]`: rows walked one by one, panels, their tails in rows, tokens and blocks, several tasks.
const SHAPES: &[[usize; 3]] = &[
    [1, 0, 64],
    [1, 1, 64],
    [1, 7, 192],
    [1, 700, 64],
    [2, 3, 128],
    [3, 40, 64],
    [4, 1, 64],
    [5, 33, 192],
    [13, 17, 64],
    [15, 70, 128],
    [31, 65, 1088],
    [12, 600, 64],
];

/// The definition of activations in 8 bits, of every 64 a unit and their codes.
fn rounded(x: &[f32]) -> Vec<f64> {
    x.chunks(64)
        .flat_map(|x| {
            let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let (unit, inverse) = (f64::from(largest / 127.0), 127.0 / largest);
            x.iter().map(move |x| f64::from((x * inverse).round_ties_even()) * unit)
        })
        .collect()
}

/// What the codebook's largest value becomes before rounding to 8 bits, and in panels of plain AVX2 to 7.
const LEVELS: [f64; 2] = [127.0, 63.32];

/// Which of [`LEVELS`] a product of `t` tokens has: many are multiplied in panels.
fn level(isa: Isa, t: usize) -> usize {
    #[cfg(target_arch = "x86_64")]
    let plain = match isa {
        Isa::Avx2 => true,
        Isa::Avx512 => !is_x86_feature_detected!("avx512vnni") || !is_x86_feature_detected!("avx512vbmi"),
        _ => false,
    };
    #[cfg(not(target_arch = "x86_64"))]
    let plain = isa == Isa::Avx2;
    usize::from(plain && t >= 4)
}

/// The weight that a codebook in integers stands for.
fn coarse(nf4: &Nf4Source, n: usize, levels: f64) -> Vec<f64> {
    let largest = nf4.code.iter().fold(0.0_f64, |m, c| m.max(f64::from(c.abs())));
    let code = nf4.code.map(|c| (f64::from(c) / largest * levels).round_ties_even() * largest / levels);
    let nibble = |i: usize| usize::from(nf4.packed[i / 2] >> [4, 0][i % 2] & 15);
    (0..n).map(|i| code[nibble(i)] * f64::from(nf4.absmax.get(i / nf4.block))).collect()
}

fn int8_product<B: Backend>(device: &B, source: &MatrixSource, x: &[f32], len: usize) -> Vec<Vec<f32>> {
    let mut y = poisoned(device, len);
    device
        .run(Call::Matmul {
            arithmetic: Arithmetic::Int8,
            w: &device.matrix(source.clone()).unwrap(),
            x: &buffer(device, x),
            y: &mut y,
            accumulate: false,
        })
        .unwrap();
    vec![read(device, &y)]
}

#[test]
fn products_in_8_bits_meet_their_definition_and_stay_near_the_exact_ones() {
    let mut report = Report::default();
    let mut random = Random(41);
    for &[t, o, k] in SHAPES {
        if !affordable(t * o * k) {
            continue;
        }
        for kind in KINDS {
            let (source, w) = weights::random(&mut random, kind, o, k);
            let MatrixData::Nf4(nf4) = &source.data else { unreachable!("`KINDS` has nothing else") };
            let x = random.vector(t * k);
            let (exact, _) = oracle::matmul(&wide(&x), &wide(&w), k);
            let definitions = LEVELS.map(|levels| {
                let (y, size) = oracle::matmul(&rounded(&x), &coarse(nf4, o * k, levels), k);
                let bounds = size.iter().map(|size| EPS * (k as f64 / 16.0 + 16.0) * (size + 1.0)).collect();
                let error: f64 = y.iter().zip(&exact).map(|(y, e)| (y - e) * (y - e)).sum();
                let norm: f64 = exact.iter().map(|e| e * e).sum();
                // 0.4 % of noise from either side, of 7 bits twice as much, more for a product of few terms.
                let (relative, most) = ((error / norm).sqrt(), 0.06 * 127.0 / levels);
                assert!(relative < most || o * t < 20, "{kind:?} T={t} O={o} K={k}: relative error {relative}");
                [Expected::new(y, bounds)]
            });
            let name = format!("matmul int8 {kind:?} T={t} O={o} K={k}");
            report.cpus_by(&name, |isa| &definitions[level(isa, t)], |cpu| int8_product(cpu, &source, &x, t * o));
            #[cfg(feature = "vulkan")]
            {
                // One token goes to a shader, which computes in f32; more are left to the CPU.
                let (exact, size) = oracle::matmul(&wide(&x), &wide(&w), k);
                let bounds = size.iter().map(|size| EPS * (k as f64 / 8.0 + 16.0) * (size + 1.0)).collect();
                let exact = [Expected::new(exact, bounds)];
                let expected =
                    if t == 1 { &exact } else { &definitions[level(pocketlora_kernels::cpu::Table::best().isa(), t)] };
                report.vulkan(&name, expected, |device| int8_product(device, &source, &x, t * o));
            }
        }
    }
}

#[test]
fn weights_without_a_path_in_8_bits_are_multiplied_exactly() {
    let mut report = Report::default();
    let mut random = Random(42);
    let small_blocks = Kind::Nf4 { block: 32, double: true, dtype: FloatType::F16 };
    for (kind, [t, o, k]) in [
        (KINDS[0], [1, 5, 96]),
        (KINDS[0], [6, 5, 70]),
        (small_blocks, [1, 5, 64]),
        (small_blocks, [5, 9, 64]),
        (Kind::Dense(FloatType::F16), [1, 9, 64]),
        (Kind::Dense(FloatType::F32), [3, 9, 64]),
    ] {
        if !affordable(t * o * k / 2) {
            continue;
        }
        let (source, w) = weights::random(&mut random, kind, o, k);
        let x = random.vector(t * k);
        let (y, size) = oracle::matmul(&wide(&x), &wide(&w), k);
        let bounds = size.iter().map(|size| EPS * (k as f64 / 8.0 + 16.0) * (size + 1.0)).collect();
        case!(report, &format!("matmul int8 {kind:?} T={t} O={o} K={k}"), &[Expected::new(y, bounds)], |cpu| {
            let mut y = poisoned(cpu, t * o);
            cpu.run(Call::Matmul {
                arithmetic: Arithmetic::Int8,
                w: &cpu.matrix(source.clone()).unwrap(),
                x: &buffer(cpu, &x),
                y: &mut y,
                accumulate: false,
            })
            .unwrap();
            vec![read(cpu, &y)]
        });
    }
}

/// A matrix in 8 bits and its values.
fn int8(random: &mut Random, rows: usize, cols: usize) -> (MatrixSource, Vec<f64>) {
    let (mut codes, mut scales, mut values) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rows {
        let mut row = vec![0; cols];
        let scale = encode_int8(&random.vector(cols), &mut row);
        let code = |i: usize| row[i / 64 * 64 + i % 2 * 32 + i % 64 / 2];
        values.extend((0..cols).map(|i| f64::from(code(i)) * f64::from(scale)));
        codes.extend(row.iter().map(|c| c.cast_unsigned()));
        scales.extend(scale.to_le_bytes());
    }
    let data = MatrixData::Int8 { codes: Bytes::from(codes), scales: Bytes::from(scales) };
    (MatrixSource { rows, cols, data }, values)
}

#[test]
fn matrices_in_8_bits_meet_their_definition() {
    let mut report = Report::default();
    let mut random = Random(43);
    for [t, o, k] in [[1, 1, 64], [1, 600, 128], [2, 5, 64], [9, 67, 192], [13, 300, 64]] {
        if !affordable(t * o * k) {
            continue;
        }
        let (source, w) = int8(&mut random, o, k);
        let x = random.vector(t * k);
        let ids: Vec<u32> = (0..o as u32).rev().collect();
        let rows = ids.iter().flat_map(|id| w[*id as usize * k..][..k].to_vec()).collect();
        let (y, size) = oracle::matmul(&rounded(&x), &w, k);
        let (dx, dx_size) = oracle::matmul(&oracle::matmul(&wide(&x), &w, k).0, &oracle::transpose(&w, k), o);
        let bound = |size: &[f64], n: usize| size.iter().map(|s| EPS * (n as f64 + 16.0) * (s + 1.0)).collect();
        let dy: Vec<f32> = oracle::matmul(&wide(&x), &w, k).0.iter().map(|y| *y as f32).collect();
        let expected = [
            Expected::new(y, bound(&size, k / 16)),
            Expected::relative(rows, EPS),
            Expected::new(dx, bound(&dx_size, o)),
        ];
        case!(report, &format!("int8 matrix T={t} O={o} K={k}"), &expected, |cpu| {
            let w = cpu.matrix(source.clone()).unwrap();
            let (mut y, mut e, mut dx) = (poisoned(cpu, t * o), poisoned(cpu, o * k), poisoned(cpu, t * k));
            cpu.run(Call::Matmul {
                arithmetic: Arithmetic::Int8,
                w: &w,
                x: &buffer(cpu, &x),
                y: &mut y,
                accumulate: false,
            })
            .unwrap();
            cpu.run(Call::Embed { table: &w, ids: &ids, y: &mut e }).unwrap();
            cpu.run(Call::MatmulVjpX {
                arithmetic: Arithmetic::Exact,
                terms: &[(&w, &buffer(cpu, &dy))],
                dx: &mut dx,
                accumulate: false,
            })
            .unwrap();
            vec![read(cpu, &y), read(cpu, &e), read(cpu, &dx)]
        });
    }
}

/// All codes of activations and weights at their limits, where sums of few products in 16 bits are the largest.
#[test]
fn the_largest_codes_do_not_overflow() {
    let mut report = Report::default();
    let mut random = Random(48);
    for t in [1, 2, 5] {
        let (o, k) = (5, 128);
        if !affordable(t * o * k / 2) {
            continue;
        }
        let (mut nf4, _) = weights::random(&mut random, KINDS[0], o, k);
        let MatrixData::Nf4(source) = &mut nf4.data else { unreachable!("`KINDS` has nothing else") };
        source.packed = Bytes::from(vec![0xff; o * k / 2]);
        let nf4_values = LEVELS.map(|levels| coarse(source, o * k, levels));
        let (codes, scales) = (Bytes::from(vec![0x81; o * k]), Bytes::from(1.0_f32.to_le_bytes().repeat(o)));
        let int8 = MatrixSource { rows: o, cols: k, data: MatrixData::Int8 { codes, scales } };
        let int8_values = [0; 2].map(|_| vec![-127.0; o * k]);
        for x in [1.0, -1.0] {
            let x = vec![x; t * k];
            for (name, source, values) in [("nf4", &nf4, &nf4_values), ("int8", &int8, &int8_values)] {
                let definitions = values.each_ref().map(|values| {
                    let (y, size) = oracle::matmul(&rounded(&x), values, k);
                    let bounds = size.iter().map(|size| EPS * 32.0 * (size + 1.0)).collect();
                    [Expected::new(y, bounds)]
                });
                let name = format!("{name} of largest codes T={t} x={}", x[0]);
                // Not by way of `case!`: other devices multiply one token exactly.
                report.cpus_by(
                    &name,
                    |isa| &definitions[level(isa, t)],
                    |cpu| {
                        let mut y = poisoned(cpu, t * o);
                        let w = cpu.matrix(source.clone()).unwrap();
                        cpu.run(Call::Matmul {
                            arithmetic: Arithmetic::Int8,
                            w: &w,
                            x: &buffer(cpu, &x),
                            y: &mut y,
                            accumulate: false,
                        })
                        .unwrap();
                        vec![read(cpu, &y)]
                    },
                );
            }
        }
    }
}

#[test]
fn a_number_that_is_none_spoils_its_token_and_no_other() {
    let mut report = Report::default();
    let mut random = Random(44);
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for t in [1, 3, 14] {
            if !affordable(t * 40 * 192 / 4) {
                continue;
            }
            let (source, _) = weights::random(&mut random, KINDS[0], 40, 192);
            let MatrixData::Nf4(nf4) = &source.data else { unreachable!("`KINDS` has nothing else") };
            let mut x = random.vector(t * 192);
            let definitions = LEVELS.map(|levels| {
                let (mut y, size) = oracle::matmul(&rounded(&x), &coarse(nf4, 40 * 192, levels), 192);
                y[(t - 1) * 40..].fill(f64::NAN);
                let bounds = size.iter().map(|size| EPS * 64.0 * (size + 1.0)).collect();
                [Expected::new(y, bounds)]
            });
            x[(t - 1) * 192 + 70] = bad;
            let name = format!("matmul int8 with {bad} in token {t}");
            // Not by way of `case!`: where one token is multiplied exactly, an infinity may stay one.
            report.cpus_by(&name, |isa| &definitions[level(isa, t)], |cpu| int8_product(cpu, &source, &x, t * 40));
        }
    }
}

#[test]
fn products_in_bf16_err_by_no_more_than_their_rounding() {
    let mut report = Report::default();
    let mut random = Random(45);
    let shapes = [[8, 3, 5], [9, 40, 64], [33, 70, 43], [17, 8, 576], [20, 100, 8], [13, 33, 530], [70, 530, 16]];
    // Sums cut into panels, several panels at a time, and tokens after whole dozens.
    for [t, o, k] in shapes.into_iter().chain([[28, 1040, 33], [29, 65, 1088], [16, 9, 2112]]) {
        if !affordable(t * o * k) {
            continue;
        }
        for kind in [Kind::Dense(FloatType::F16), KINDS[0], weights::KINDS[6]] {
            let (source, w) = weights::random(&mut random, kind, o, k);
            let (x, dy) = (random.vector(t * k), random.vector(t * o));
            let (y, y_size) = oracle::matmul(&wide(&x), &wide(&w), k);
            let (dx, dx_size) = oracle::matmul(&wide(&dy), &oracle::transpose(&wide(&w), k), o);
            // Two operands of 8 bits of mantissa, the sum in f32.
            let bound = |s: &[f64], n: usize| {
                s.iter().map(|s| (s + 1e-30) * (2.0 / 256.0 + 1e-5 + EPS * n as f64)).collect::<Vec<_>>()
            };
            let more = |y: &[f64]| y.iter().map(|y| y + 1.0).collect::<Vec<_>>();
            let expected = [
                Expected::new(y, bound(&y_size, k)),
                Expected::new(more(&dx), bound(&dx_size, o).iter().map(|b| b + EPS).collect()),
            ];
            case!(report, &format!("matmul bf16 {kind:?} T={t} O={o} K={k}"), &expected, |cpu| {
                let w = cpu.matrix(source.clone()).unwrap();
                let (mut y, mut dx) = (poisoned(cpu, t * o), buffer(cpu, &vec![1.0; t * k]));
                cpu.run(Call::Matmul {
                    arithmetic: Arithmetic::Bf16,
                    w: &w,
                    x: &buffer(cpu, &x),
                    y: &mut y,
                    accumulate: false,
                })
                .unwrap();
                cpu.run(Call::MatmulVjpX {
                    arithmetic: Arithmetic::Bf16,
                    terms: &[(&w, &buffer(cpu, &dy))],
                    dx: &mut dx,
                    accumulate: true,
                })
                .unwrap();
                vec![read(cpu, &y), read(cpu, &dx)]
            });
        }
    }
}

#[test]
fn grouped_products_with_adapters_equal_the_single_ones() {
    let mut report = Report::default();
    let mut random = Random(46);
    let cases = [0, 1, 2, 9].map(|t| (t, Arithmetic::Exact)).into_iter().chain([9, 17].map(|t| (t, Arithmetic::Bf16)));
    // Terms on all rows, or on some of them as in a batch.
    for ((t, arithmetic), rows) in cases.flat_map(|case| [(case, ALL_ROWS), (case, case.0 / 3..case.0 - case.0 / 4)]) {
        // Of two operands, and of what the adapter's way down leaves.
        let rounding = if arithmetic == Arithmetic::Bf16 { 4.0 / 256.0 } else { 0.0 };
        for k in [64, 200, 576] {
            let shapes =
                if cfg!(miri) { [(7, 2), (3, 1), (9, 3), (5, 0)] } else { [(70, 16), (24, 8), (300, 3), (5, 0)] };
            if !affordable(t * k * shapes.iter().map(|s| s.0).sum::<usize>() / 4) {
                continue;
            }
            let x = random.vector(t * k);
            let mut expected = Vec::new();
            let mut parts = Vec::new();
            for (i, (o, rank)) in shapes.into_iter().enumerate() {
                let (source, w) = weights::random(&mut random, weights::KINDS[[3, 1, 4, 3][i]], o, k);
                let (mut y, size) = oracle::matmul(&wide(&x), &wide(&w), k);
                let bound = |s: &f64| EPS * (k as f64 / 8.0 + 16.0) * (s + 1.0) + rounding * s;
                let mut bounds: Vec<f64> = size.iter().map(bound).collect();
                // The second layer has two adapters, the last none.
                let adapters: Vec<_> = (0..[1, 2, 1, 0][i])
                    .map(|_| (random.vector(rank * k), random.vector(o * rank), 0.5 + random.uniform()))
                    .collect();
                for (a, b, scale) in &adapters {
                    let (h, h_size) = oracle::matmul(&wide(&x), &wide(a), k);
                    let (low, low_size) = oracle::matmul(&h, &wide(b), rank);
                    let (_, all_size) = oracle::matmul(&h_size, &wide(b), rank);
                    for (i, low) in low.iter().enumerate().filter(|(i, _)| rows.contains(&(i / o))) {
                        y[i] += f64::from(*scale) * low;
                        bounds[i] +=
                            EPS * k as f64 * (low_size[i] + 1.0) + rounding * f64::from(scale.abs()) * all_size[i];
                    }
                }
                expected.push(Expected::new(y, bounds));
                parts.push((source, adapters, o, rank));
            }
            case!(report, &format!("matmul_group {arithmetic:?} T={t} K={k} {rows:?}"), &expected, |cpu| {
                let matrix = |rows: usize, cols: usize, values: &[f32]| {
                    let mut matrix = cpu.work_matrix(rows, cols, WorkType::F32).unwrap();
                    cpu.set_matrix(&mut matrix, &buffer(cpu, values));
                    matrix
                };
                let weights: Vec<_> = parts
                    .iter()
                    .map(|(source, adapters, o, rank)| {
                        let put =
                            |(a, b, s): &(Vec<f32>, Vec<f32>, f32)| (matrix(*rank, k, a), matrix(*o, *rank, b), *s);
                        (cpu.matrix(source.clone()).unwrap(), adapters.iter().map(put).collect::<Vec<_>>())
                    })
                    .collect();
                let mut ys: Vec<_> = parts.iter().map(|part| poisoned(cpu, t * part.2)).collect();
                let mut products: Vec<_> = weights
                    .iter()
                    .zip(&mut ys)
                    .map(|((w, adapters), y)| {
                        let low_rank = adapters
                            .iter()
                            .map(|(a, b, scale)| LowRank { a, b, scale: *scale, rows: rows.clone() })
                            .collect();
                        Product { w, low_rank, y }
                    })
                    .collect();
                cpu.run(Call::MatmulGroup { arithmetic, x: &buffer(cpu, &x), products: &mut products }).unwrap();
                ys.iter().map(|y| read(cpu, y)).collect()
            });
        }
    }
}

/// How far rounding to 8 bits with a scale for each row may move an element, row by row.
fn half_steps(w: &[f32], cols: usize) -> Vec<f64> {
    let step = |row: &[f32]| row.iter().fold(0.0_f32, |m, x| m.max(x.abs())) / 127.0;
    // Scales of up-projections are rounded up to bf16.
    w.chunks(cols).map(|row| f64::from(step(row)) * 0.5 * (1.0 + 1.0 / 128.0)).collect()
}

/// One token's product in 8 bits with low-rank terms, which are then in 8 bits, too: each term is off by what rounding
/// `x`, `A` and `B` can make of it, and no more.
#[test]
fn adapters_beside_products_in_8_bits_err_by_no_more_than_their_rounding() {
    let mut report = Report::default();
    let mut random = Random(49);
    for (o, k, rank) in [(1, 64, 1), (33, 128, 3), (70, 576, 16), (300, 1088, 8), (31, 64, 70), (600, 192, 32)] {
        if !affordable(o * k) {
            continue;
        }
        for bad in [None, Some(f32::NAN), Some(f32::INFINITY)] {
            let (source, _) = weights::random(&mut random, KINDS[0], o, k);
            let MatrixData::Nf4(nf4) = &source.data else { unreachable!("`KINDS` has nothing else") };
            let (mut x, a, b) = (random.vector(k), random.vector(rank * k), random.vector(o * rank));
            let scale = 0.5 + random.uniform().abs();
            let (base, size) = oracle::matmul(&rounded(&x), &coarse(nf4, o * k, LEVELS[0]), k);
            let (h, h_size) = oracle::matmul(&wide(&x), &wide(&a), k);
            let (low, _) = oracle::matmul(&h, &wide(&b), rank);
            let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let (a_steps, b_steps) = (half_steps(&a, k), half_steps(&b, rank));
            let x_size: f64 = x.iter().map(|x| f64::from(x.abs())).sum();
            // Of each `h[i]`: `x` off by half a unit, and `A` by half a step; f16 and f32 come on top.
            let off: Vec<f64> = (0..rank)
                .map(|i| {
                    let a_size: f64 = a[i * k..][..k].iter().map(|a| f64::from(a.abs())).sum();
                    let x_unit = f64::from(largest) / 254.0;
                    a_size * x_unit + (x_size + k as f64 * x_unit) * a_steps[i] + 2e-3 * h_size[i]
                })
                .collect();
            // Of each eight of `h`, the largest that their largest can be.
            let most = |h: &[f64], off: &[f64]| h.iter().zip(off).fold(0.0_f64, |m, (h, off)| m.max(h.abs() + off));
            let h_steps: Vec<f64> = h.chunks(8).zip(off.chunks(8)).map(|(h, off)| most(h, off) / 254.0).collect();
            let mut bounds = Vec::new();
            for (row, size) in size.iter().enumerate() {
                let part = |i: usize| {
                    let b = f64::from(b[row * rank + i].abs());
                    (b + b_steps[row]) * (off[i] + h_steps[i / 8]) + (b_steps[row] + 1e-3 * b) * h[i].abs()
                };
                let low: f64 = (0..rank).map(part).sum();
                bounds.push(f64::from(scale) * low + EPS * (k as f64 / 16.0 + 16.0) * (size + 1.0));
            }
            let mut y: Vec<f64> = base.iter().zip(&low).map(|(base, low)| base + f64::from(scale) * low).collect();
            if let Some(bad) = bad {
                x[k - 1] = bad;
                y.fill(f64::NAN);
            }
            let name = format!("matmul_group int8 O={o} K={k} rank {rank}, bad element {bad:?}");
            // Not by way of `case!`: other devices multiply one token exactly.
            report.cpus(&name, &[Expected::new(y, bounds)], |cpu| {
                let matrix = |rows: usize, cols: usize, values: &[f32]| {
                    let mut matrix = cpu.work_matrix(rows, cols, WorkType::F16).unwrap();
                    // What is set first must leave no trace in copies made of it.
                    cpu.set_matrix(&mut matrix, &buffer(cpu, &vec![3.0; values.len()]));
                    (matrix, buffer(cpu, values))
                };
                let (mut a, a_values) = matrix(rank, k, &a);
                let (mut b, b_values) = matrix(o, rank, &b);
                let (w, x) = (cpu.matrix(source.clone()).unwrap(), buffer(cpu, &x));
                let mut y = poisoned(cpu, o);
                for pass in 0..2 {
                    let low_rank = vec![LowRank { a: &a, b: &b, scale, rows: ALL_ROWS }];
                    let mut products = [Product { w: &w, low_rank, y: &mut y }];
                    cpu.run(Call::MatmulGroup { arithmetic: Arithmetic::Int8, x: &x, products: &mut products })
                        .unwrap();
                    if pass == 0 {
                        cpu.set_matrix(&mut a, &a_values);
                        cpu.set_matrix(&mut b, &b_values);
                    }
                }
                vec![read(cpu, &y)]
            });
        }
    }
}

#[test]
fn a_codebook_that_is_not_finite_has_no_path_in_8_bits() {
    let mut report = Report::default();
    let mut random = Random(47);
    let (mut source, _) = weights::random(&mut random, KINDS[1], 4, 64);
    let MatrixData::Nf4(nf4) = &mut source.data else { unreachable!("`KINDS` has nothing else") };
    nf4.code[3] = f32::INFINITY;
    nf4.packed = Bytes::from(vec![0x33; 128]);
    nf4.absmax = Absmax::Plain(Bytes::from(1.0_f32.to_le_bytes().repeat(4)));
    case!(report, "infinite codebook", &[Expected::new(vec![f64::INFINITY; 4], vec![0.0; 4])], |cpu| {
        let mut y = poisoned(cpu, 4);
        cpu.run(Call::Matmul {
            arithmetic: Arithmetic::Int8,
            w: &cpu.matrix(source.clone()).unwrap(),
            x: &buffer(cpu, &[1.0; 64]),
            y: &mut y,
            accumulate: false,
        })
        .unwrap();
        vec![read(cpu, &y)]
    });
}

#[test]
fn a_sum_of_gradients_by_x_equals_the_single_ones() {
    let mut report = Report::default();
    let mut random = Random(51);
    for (t, arithmetic) in [(1, Arithmetic::Exact), (9, Arithmetic::Exact), (17, Arithmetic::Bf16)] {
        let rounding = if arithmetic == Arithmetic::Bf16 { 2.0 / 256.0 + 1e-5 } else { 0.0 };
        for (k, rows) in [(70, [40, 3, 0]), (128, [600, 200, 16])] {
            if !affordable(t * k * rows.iter().sum::<usize>()) {
                continue;
            }
            let mut terms = Vec::new();
            let (mut dx, mut size) = (vec![1.0; t * k], vec![1.0; t * k]);
            for (o, kind) in rows.into_iter().zip([KINDS[0], Kind::Dense(FloatType::F16), Kind::Dense(FloatType::F16)])
            {
                let (source, w) = weights::random(&mut random, kind, o, k);
                let dy = random.vector(t * o);
                if o > 0 {
                    let (part, part_size) = oracle::matmul(&wide(&dy), &oracle::transpose(&wide(&w), k), o);
                    dx.iter_mut().zip(part).for_each(|(dx, part)| *dx += part);
                    size.iter_mut().zip(part_size).for_each(|(size, part)| *size += part);
                }
                terms.push((source, dy));
            }
            let depth = rows.iter().sum::<usize>() as f64;
            let bound: Vec<f64> = size.iter().map(|s| s * (rounding + EPS * depth) + EPS).collect();
            let without = dx.iter().map(|dx| dx - 1.0).collect();
            let expected = [Expected::new(dx, bound.clone()), Expected::new(without, bound)];
            case!(report, &format!("matmul_vjp_x_sum {arithmetic:?} T={t} K={k} O={rows:?}"), &expected, |cpu| {
                let held: Vec<_> =
                    terms.iter().map(|(w, dy)| (cpu.matrix(w.clone()).unwrap(), buffer(cpu, dy))).collect();
                let held: Vec<_> = held.iter().map(|(w, dy)| (w, dy)).collect();
                let (mut added, mut dx) = (buffer(cpu, &vec![1.0; t * k]), poisoned(cpu, t * k));
                cpu.run(Call::MatmulVjpX { arithmetic, terms: &held, dx: &mut added, accumulate: true }).unwrap();
                cpu.run(Call::MatmulVjpX { arithmetic, terms: &held, dx: &mut dx, accumulate: false }).unwrap();
                vec![read(cpu, &added), read(cpu, &dx)]
            });
        }
    }
}
