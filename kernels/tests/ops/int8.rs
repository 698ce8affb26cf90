//! Products in 8 bits: what they are defined to be, how near that is to exact, and what they do with numbers that are none.

use super::harness::{
    EPS, Expected, Random, Report, affordable, case, gradient_x, poisoned, product, product_of, read, wide,
};
use super::oracle;
use super::weights::{self, Kind};
use Arithmetic::{Exact, Int8};
use bytes::Bytes;
use pocketlora_kernels::cpu::Isa;
use pocketlora_kernels::quant::encode_int8;
use pocketlora_kernels::{Absmax, Arithmetic, Backend, Call, FloatType, MatrixData, MatrixSource, Memory, Nf4Source};

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
pub fn rounded(x: &[f32]) -> Vec<f64> {
    x.chunks(64)
        .flat_map(|x| {
            let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
            let (unit, inverse) = (f64::from(largest / 127.0), 127.0 / largest);
            x.iter().map(move |x| f64::from((x * inverse).round_ties_even()) * unit)
        })
        .collect()
}

/// What the codebook's largest value becomes before rounding to 8 bits, and in panels of plain AVX2 to 7.
pub const LEVELS: [f64; 2] = [127.0, 63.32];

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
pub fn coarse(nf4: &Nf4Source, n: usize, levels: f64) -> Vec<f64> {
    let largest = nf4.code.iter().fold(0.0_f64, |m, c| m.max(f64::from(c.abs())));
    let code = nf4.code.map(|c| (f64::from(c) / largest * levels).round_ties_even() * largest / levels);
    let nibble = |i: usize| usize::from(nf4.packed[i / 2] >> [4, 0][i % 2] & 15);
    (0..n).map(|i| code[nibble(i)] * f64::from(nf4.absmax.get(i / nf4.block))).collect()
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
            report.cpus_by(&name, |isa| &definitions[level(isa, t)], |cpu| vec![product_of(cpu, Int8, &source, &x)]);
            #[cfg(feature = "vulkan")]
            {
                // One token goes to a shader, which computes in f32; more are left to the CPU.
                let (exact, size) = oracle::matmul(&wide(&x), &wide(&w), k);
                let bounds = size.iter().map(|size| EPS * (k as f64 / 8.0 + 16.0) * (size + 1.0)).collect();
                let exact = [Expected::new(exact, bounds)];
                let expected =
                    if t == 1 { &exact } else { &definitions[level(pocketlora_kernels::cpu::Table::best().isa(), t)] };
                report.vulkan(&name, expected, |device| vec![product_of(device, Int8, &source, &x)]);
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
            vec![product_of(cpu, Int8, &source, &x)]
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
            let mut e = poisoned(cpu, o * k);
            cpu.run(Call::Embed { table: &w, ids: &ids, y: &mut e }).unwrap();
            let dx = gradient_x(cpu, Exact, &[(&w, &dy)], t, false);
            vec![product(cpu, Int8, &w, &x, false), read(cpu, &e), dx]
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
                report.cpus_by(&name, |isa| &definitions[level(isa, t)], |cpu| vec![product_of(cpu, Int8, source, &x)]);
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
            report.cpus_by(&name, |isa| &definitions[level(isa, t)], |cpu| vec![product_of(cpu, Int8, &source, &x)]);
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
        vec![product_of(cpu, Int8, &source, &[1.0; 64])]
    });
}
