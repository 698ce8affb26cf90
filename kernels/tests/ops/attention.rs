//! Attention over segments and over a cache.

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, poisoned, read, wide};
use super::oracle;
use pocketlora_kernels::{Attention, Backend, CacheType, Call, Memory};

type Case = (usize, usize, usize, Option<usize>, &'static [usize]);

/// Heads, key/value heads, head width, window, segments: groups, blocks of 64 keys and 48 queries and their
/// borders, windows shorter and longer than a block, packed samples, an empty segment, stretches of backward.
const CASES: &[Case] = &[
    (1, 1, 8, None, &[1]),
    (2, 1, 12, None, &[5]),
    (3, 3, 7, None, &[2, 3]),
    (4, 2, 16, Some(3), &[17]),
    (2, 2, 8, Some(1), &[4]),
    (6, 2, 8, None, &[65]),
    (2, 1, 8, Some(40), &[130]),
    (3, 1, 8, Some(64), &[66, 0, 7]),
    (2, 1, 17, None, &[300]),
    (2, 2, 64, Some(100), &[270, 129]),
    (10, 1, 24, None, &[150]),
];

fn spec(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> Attention {
    Attention { heads, kv_heads, head_dim, scale: 1.3 / (head_dim as f32).sqrt(), softcap: None, window }
}

/// With scores as they are, and held below about what the larger ones are.
fn capped_or_not(spec: Attention) -> [Attention; 2] {
    [spec, Attention { softcap: Some(0.7), ..spec }]
}

#[test]
fn attention_and_its_gradients_meet_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(11);
    let specs = CASES.iter().flat_map(|&(heads, kv_heads, d, window, segments)| {
        capped_or_not(spec(heads, kv_heads, d, window)).map(|spec| (spec, segments))
    });
    for (spec, segments) in specs {
        let Attention { heads, kv_heads, head_dim: d, .. } = spec;
        let t: usize = segments.iter().sum();
        if !affordable(t * t * heads * d) {
            continue;
        }
        let [q, dy] = [0; 2].map(|_| random.vector(t * heads * d));
        let [k, v] = [0; 2].map(|_| random.vector(t * kv_heads * d));
        let (q64, k64, v64, dy64) = (wide(&q), wide(&k), wide(&v), wide(&dy));
        let (y, lse) = oracle::attention(&spec, segments, &q64, &k64, &v64);
        let [dq, dk, dv] = oracle::attention_vjp(&spec, segments, &q64, &k64, &v64, &dy64);
        // Values are averages of v, up to 1; gradients sum over as many as t queries, and their terms, of the
        // size of 1, may cancel.
        let average = |x| Expected::new(x, vec![16.0 * EPS; t * heads * d]);
        let gradient = |x: Vec<f64>| {
            let largest = x.iter().fold(0.5_f64, |m, x| m.max(x.abs()));
            let bounds = vec![32.0 * EPS * largest; x.len()];
            Expected::new(x, bounds)
        };
        let expected =
            [average(y), Expected::new(lse, vec![16.0 * EPS; t * heads]), gradient(dq), gradient(dk), gradient(dv)];
        case!(report, &format!("attention {spec:?} {segments:?}"), &expected, |cpu| {
            let [q, k, v, dy] = [&q, &k, &v, &dy].map(|x| buffer(cpu, x));
            let [mut y, mut dq] = [0; 2].map(|_| poisoned(cpu, t * heads * d));
            let [mut dk, mut dv] = [0; 2].map(|_| poisoned(cpu, t * kv_heads * d));
            let mut lse = poisoned(cpu, t * heads);
            cpu.run(Call::Attention {
                spec: &spec,
                segments,
                q: &q,
                k: &k,
                v: &v,
                sinks: None,
                y: &mut y,
                lse: &mut lse,
            })
            .unwrap();
            cpu.run(Call::AttentionVjp {
                spec: &spec,
                segments,
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
            [y, lse, dq, dk, dv].map(|b| read(cpu, &b)).into()
        });
    }
}

/// The analytic oracle against central differences of the naive forward.
#[test]
#[cfg_attr(miri, ignore = "runs the oracle alone")]
fn the_oracle_of_the_gradients_is_right() {
    let mut random = Random(12);
    let segments = [5, 2];
    let (q, dy) = (wide(&random.vector(7 * 12)), wide(&random.vector(7 * 12)));
    let (k, v) = (wide(&random.vector(7 * 6)), wide(&random.vector(7 * 6)));
    for spec in capped_or_not(spec(4, 2, 3, Some(3))) {
        let got = oracle::attention_vjp(&spec, &segments, &q, &k, &v, &dy);
        let want = [
            oracle::gradient(&q, &dy, |q| oracle::attention(&spec, &segments, q, &k, &v).0),
            oracle::gradient(&k, &dy, |k| oracle::attention(&spec, &segments, &q, k, &v).0),
            oracle::gradient(&v, &dy, |v| oracle::attention(&spec, &segments, &q, &k, v).0),
        ];
        for (got, want) in got.iter().flatten().zip(want.iter().flatten()) {
            assert!((got - want).abs() < 1e-8, "{got} {want}");
        }
    }
}

#[test]
fn attention_over_a_cache_meets_the_oracle() {
    let mut report = Report::default();
    let mut random = Random(13);
    // Tokens in the cache, new ones among them, window, heads, key/value heads, head width: one block and several, few
    // rows of queries and many, whole vectors and rests, contexts that are cut into parts.
    let cases = [
        (1, 1, None, (6, 2, 10)),
        (6, 6, None, (6, 2, 10)),
        (70, 1, None, (6, 2, 10)),
        (70, 3, Some(5), (6, 2, 10)),
        (130, 20, Some(66), (6, 2, 10)),
        (1100, 1, None, (3, 1, 64)),
        (1100, 3, Some(700), (4, 2, 24)),
        (1400, 1, Some(1000), (7, 1, 40)),
        (640, 9, None, (9, 1, 33)),
        (200, 130, None, (2, 1, 64)),
    ];
    for (keys, new, window, (heads, kv_heads, d)) in cases {
        if !affordable(keys * new * heads * d) {
            continue;
        }
        let specs = capped_or_not(spec(heads, kv_heads, d, window));
        let types = [CacheType::F32, CacheType::F16, CacheType::I8];
        for (spec, dtype) in specs.into_iter().flat_map(|spec| types.map(|dtype| (spec, dtype))) {
            let q = random.vector(new * heads * d);
            let [k, v] = [0; 2].map(|_| random.vector(keys * kv_heads * d));
            let int8 = |x: &[f32]| {
                let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
                let code = |x: &f32| f64::from((x * (127.0 / largest)).round_ties_even());
                x.iter().map(|x| code(x) * f64::from(largest / 127.0)).collect::<Vec<_>>()
            };
            let stored = |x: &[f32]| match dtype {
                CacheType::I8 => x.chunks(d).flat_map(int8).collect(),
                CacheType::F32 => wide(x),
                CacheType::F16 => x.iter().map(|x| half::f16::from_f32(*x).to_f64()).collect(),
            };
            let (y, _) = oracle::attention(&spec, &[keys], &wide(&q), &stored(&k), &stored(&v));
            let expected = [Expected::new(y, vec![16.0 * EPS; new * heads * d])];
            case!(report, &format!("attention_cached {dtype:?} {spec:?} {new} of {keys}"), &expected, |cpu| {
                let width = kv_heads * d;
                let mut cache = cpu.cache(spec.kv_heads, spec.head_dim, dtype, spec.window);
                // Appended in two parts, with a wrong token that is taken back between them.
                let half = keys / 2;
                let [all_k, all_v] = [&k, &v].map(|x| buffer(cpu, x));
                cpu.run(Call::CacheAppend { cache: &mut cache, k: &all_k, v: &all_v, rows: 0..half }).unwrap();
                let wrong = poisoned(cpu, width);
                cpu.run(Call::CacheAppend { cache: &mut cache, k: &wrong, v: &wrong, rows: 0..1 }).unwrap();
                assert_eq!(cpu.cache_rewind(&mut cache, half), half);
                cpu.run(Call::CacheAppend { cache: &mut cache, k: &all_k, v: &all_v, rows: half..keys }).unwrap();
                assert_eq!(cpu.cache_len(&cache), keys);
                // Between rows of other sequences, which stay as they are.
                let others = vec![f32::NAN; 2 * heads * d];
                let batch = buffer(cpu, &[&others, &q[..], &others[..heads * d]].concat());
                let mut y = buffer(cpu, &vec![7.0; q.len() + 3 * heads * d]);
                cpu.run(Call::AttentionCached {
                    spec: &spec,
                    q: &batch,
                    cache: &cache,
                    sinks: None,
                    y: &mut y,
                    rows: 2..2 + new,
                })
                .unwrap();
                let y = read(cpu, &y);
                let (before, y) = y.split_at(2 * heads * d);
                let (y, after) = y.split_at(q.len());
                assert!(before.iter().chain(after).all(|y| *y == 7.0), "rows of other sequences were written");
                vec![y.to_vec()]
            });
        }
    }
}

#[test]
#[cfg_attr(miri, ignore = "too long")]
fn large_scores_stay_finite_and_nan_is_carried() {
    let mut report = Report::default();
    let spec = spec(1, 1, 8, None);
    let mut random = Random(14);
    let t = 70;
    let [q, k, v] = [0; 3].map(|_| random.vector(t * 8));
    let large: Vec<f32> = q.iter().map(|q| q * 300.0).collect();
    let (y, _) = oracle::attention(&spec, &[t], &wide(&large), &wide(&k), &wide(&v));
    // Scores of some 300 have an error of 300 EPS, which the exponential passes on.
    case!(report, "attention of large scores", &[Expected::new(y, vec![2000.0 * EPS; t * 8])], |cpu| {
        let [q, k, v] = [&large, &k, &v].map(|x| buffer(cpu, x));
        let (mut y, mut lse) = (poisoned(cpu, t * 8), poisoned(cpu, t));
        cpu.run(Call::Attention {
            spec: &spec,
            segments: &[t],
            q: &q,
            k: &k,
            v: &v,
            sinks: None,
            y: &mut y,
            lse: &mut lse,
        })
        .unwrap();
        vec![read(cpu, &y)]
    });
    let mut broken = q.clone();
    broken[67 * 8..][..8].fill(f32::NAN);
    let (mut y, _) = oracle::attention(&spec, &[t], &wide(&q), &wide(&k), &wide(&v));
    y[67 * 8..][..8].fill(f64::NAN);
    case!(report, "attention with a NaN query", &[Expected::new(y, vec![16.0 * EPS; t * 8])], |cpu| {
        let [q, k, v] = [&broken, &k, &v].map(|x| buffer(cpu, x));
        let (mut y, mut lse) = (poisoned(cpu, t * 8), poisoned(cpu, t));
        cpu.run(Call::Attention {
            spec: &spec,
            segments: &[t],
            q: &q,
            k: &k,
            v: &v,
            sinks: None,
            y: &mut y,
            lse: &mut lse,
        })
        .unwrap();
        vec![read(cpu, &y)]
    });
}

/// A NaN or an infinity in a key reaches the outputs of the tokens that see it, one in a value the element at its place
/// or, in 8 bits, where it makes its row's scale a NaN, all of them; heads that do not read it stay as they are.
#[test]
#[cfg_attr(miri, ignore = "too long")]
fn a_nan_in_the_cache_is_carried() {
    let mut report = Report::default();
    let mut random = Random(15);
    let (keys, d, spec) = (400, 16, spec(2, 2, 16, None));
    let q = random.vector(2 * d);
    for dtype in [CacheType::F32, CacheType::F16, CacheType::I8] {
        let exact =
            |x: f32| if dtype == CacheType::I8 { (x * 127.0).round() / 127.0 } else { (x * 256.0).round() / 256.0 };
        let mut row = || {
            let mut x: Vec<f32> = random.vector(keys * 2 * d).into_iter().map(exact).collect();
            // The largest of each row is 1, so that 8 bits hold the others exactly, but for the last place of an f32.
            x.chunks_exact_mut(d).for_each(|x| x[0] = 1.0);
            x
        };
        let (k, v) = (row(), row());
        let (y, _) = oracle::attention(&spec, &[keys], &wide(&q), &wide(&k), &wide(&v));
        for (side, broken) in [(0, f32::NAN), (1, f32::NAN), (0, f32::INFINITY), (1, f32::INFINITY)] {
            let (mut k, mut v, mut y) = (k.clone(), v.clone(), y.clone());
            // Token 290, of the second part and neither the first nor the last of its block; head 1, element 3.
            [&mut k, &mut v][side][(290 * 2 + 1) * d + 3] = broken;
            let element = d + 3;
            if side == 0 || dtype == CacheType::I8 {
                // One infinite score takes all the weight: `e^(inf - inf)`. With the other sign it would take none.
                let all = dtype == CacheType::I8 || broken.is_nan() || q[element] > 0.0;
                if !all {
                    continue;
                }
                y[d..].fill(f64::NAN);
            } else {
                y[element] = f64::from(broken);
            }
            let expected = [Expected::new(y, vec![32.0 * EPS; 2 * d])];
            case!(report, &format!("attention_cached {dtype:?} with {broken} on side {side}"), &expected, |cpu| {
                let mut cache = cpu.cache(2, d, dtype, None);
                let [k, v, q] = [&k, &v, &q].map(|x| buffer(cpu, x));
                let rows = 0..cpu.len(&k) / (2 * d);
                cpu.run(Call::CacheAppend { cache: &mut cache, k: &k, v: &v, rows }).unwrap();
                let mut y = poisoned(cpu, 2 * d);
                cpu.run(Call::AttentionCached {
                    spec: &spec,
                    q: &q,
                    cache: &cache,
                    sinks: None,
                    y: &mut y,
                    rows: 0..1,
                })
                .unwrap();
                vec![read(cpu, &y)]
            });
        }
    }
}

/// What sinks make of the outputs `y` and log-sum-exps `lse` of attention without them.
fn sunk(spec: &Attention, sinks: &[f64], (y, lse): (Vec<f64>, Vec<f64>)) -> (Vec<f64>, Vec<f64>) {
    let sink = |row: usize| sinks[row % spec.heads];
    let all: Vec<f64> = lse.iter().enumerate().map(|(row, lse)| (lse.exp() + sink(row).exp()).ln()).collect();
    let y = y.iter().enumerate().map(|(i, y)| y * (lse[i / spec.head_dim] - all[i / spec.head_dim]).exp()).collect();
    (y, all)
}

#[test]
fn a_sink_takes_its_share_of_every_row() {
    let mut report = Report::default();
    let mut random = Random(17);
    for (heads, kv_heads, d, window, segments) in
        [(2, 1, 3, None, &[3][..]), (4, 2, 8, Some(3), &[9, 2]), (2, 2, 4, None, &[70]), (3, 1, 8, Some(5), &[12])]
    {
        let (spec, t) = (spec(heads, kv_heads, d, window), segments.iter().sum::<usize>());
        if !affordable(t * t * heads * d * t * heads * d) {
            continue;
        }
        let (q, dy) = (random.vector(t * heads * d), random.vector(t * heads * d));
        let [k, v] = [0; 2].map(|_| random.vector(t * kv_heads * d));
        let sinks: Vec<f32> = random.vector(heads).iter().map(|s| 3.0 * s).collect();
        let (s64, dy64) = (wide(&sinks), wide(&dy));
        let x64 = [&q, &k, &v].map(|x| wide(x));
        let attend = |[q, k, v]: &[Vec<f64>; 3]| sunk(&spec, &s64, oracle::attention(&spec, segments, q, k, v));
        let (y, lse) = attend(&x64);
        let mut expected = vec![Expected::norm(y, 32.0 * EPS), Expected::norm(lse, 32.0 * EPS)];
        for which in 0..3 {
            let gradient = oracle::gradient(&x64[which], &dy64, |changed| {
                let mut x = x64.clone();
                x[which] = changed.to_vec();
                attend(&x).0
            });
            // Differences in f64 are good to 1e-8.
            expected.push(Expected::norm(gradient, 64.0 * EPS + 1e-7));
        }
        case!(report, &format!("attention with sinks {spec:?} {segments:?}"), &expected, |cpu| {
            let (spec, [q, k, v, dy, sinks]) = (&spec, [&q, &k, &v, &dy, &sinks].map(|x| buffer(cpu, x)));
            let (q, k, v, dy, sinks) = (&q, &k, &v, &dy, Some(&sinks));
            let [mut y, mut dq] = [0; 2].map(|_| poisoned(cpu, t * heads * d));
            let [mut dk, mut dv] = [0; 2].map(|_| poisoned(cpu, t * kv_heads * d));
            let mut lse = poisoned(cpu, t * heads);
            cpu.run(Call::Attention { spec, segments, q, k, v, sinks, y: &mut y, lse: &mut lse }).unwrap();
            let (dq_out, dk_out, dv_out) = (&mut dq, &mut dk, &mut dv);
            let (y_in, lse_in) = (&y, &lse);
            cpu.run(Call::AttentionVjp {
                spec,
                segments,
                q,
                k,
                v,
                y: y_in,
                lse: lse_in,
                dy,
                dq: dq_out,
                dk: dk_out,
                dv: dv_out,
            })
            .unwrap();
            [y, lse, dq, dk, dv].map(|b| read(cpu, &b)).into()
        });
    }
}

/// Also where the keys of a long text are cut into parts.
#[test]
#[cfg_attr(miri, ignore = "too long")]
fn a_sink_takes_its_share_over_a_cache() {
    let mut report = Report::default();
    let mut random = Random(18);
    for (past, new) in [(0, 1), (3, 2), (40, 30), (700, 1), (700, 3)] {
        let (spec, t) = (spec(4, 2, 8, None), past + new);
        let q = random.vector(t * 32);
        let [k, v] = [0; 2].map(|_| random.vector(t * 16));
        let sinks: Vec<f32> = random.vector(4).iter().map(|s| 6.0 * s).collect();
        let plain = oracle::attention(&spec, &[t], &wide(&q), &wide(&k), &wide(&v));
        let (y, _) = sunk(&spec, &wide(&sinks), plain);
        let expected = Expected::norm(y[past * 32..].to_vec(), 32.0 * EPS);
        case!(report, &format!("cached attention with sinks {past} + {new}"), &[expected], |cpu| {
            let [q, k, v, sinks] = [&q[past * 32..], &k, &v, &sinks].map(|x| buffer(cpu, x));
            let mut cache = cpu.cache(2, 8, CacheType::F32, None);
            cpu.run(Call::CacheAppend { cache: &mut cache, k: &k, v: &v, rows: 0..t }).unwrap();
            let mut y = poisoned(cpu, new * 32);
            let (spec, sinks, rows) = (&spec, Some(&sinks), 0..new);
            cpu.run(Call::AttentionCached { spec, q: &q, cache: &cache, sinks, y: &mut y, rows }).unwrap();
            vec![read(cpu, &y)]
        });
    }
}
