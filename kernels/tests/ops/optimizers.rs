//! Optimizers against their definitions in f64, and the 8-bit one against bitsandbytes (`data/adamw8.py`).

use super::harness::{EPS, Expected, Random, Report, affordable, buffer, case, read, sum_squares, wide};
use pocketlora_kernels::quant::{dynamic_map, unsigned_dynamic_map};
use pocketlora_kernels::{AdamW, Backend, Call, Lion, Sgd};
use safetensors::SafeTensors;

const GOLDEN: &[u8] = include_bytes!("../data/adamw8.safetensors");

/// Lengths around a vector, a block and a task.
const LENGTHS: [usize; 6] = [0, 1, 9, 256, 4097, 5000];

#[test]
fn adamw_meets_the_oracle_over_ten_steps() {
    let mut report = Report::default();
    let mut random = Random(27);
    for n in LENGTHS {
        if !affordable(n * 4) {
            continue;
        }
        let start = random.vector(n);
        let grads: Vec<Vec<f32>> = (0..10).map(|_| random.vector(n)).collect();
        let (lr, b1, b2, eps, decay) = (1e-2_f64, 0.9_f64, 0.999_f64, 1e-8, 0.01);
        let (mut p, mut m, mut v) = (wide(&start), vec![0.0; n], vec![0.0; n]);
        for (step, grad) in grads.iter().enumerate() {
            let t = step as i32 + 1;
            for i in 0..n {
                let g = f64::from(grad[i]);
                p[i] -= lr * decay * p[i];
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                p[i] -= lr * (m[i] / (1.0 - b1.powi(t))) / ((v[i] / (1.0 - b2.powi(t))).sqrt() + eps);
            }
        }
        let square: f64 = wide(&start).iter().map(|x| x * x).sum();
        let expected = [p, m, v].map(|x| Expected::norm(x, 64.0 * EPS));
        case!(report, &format!("adamw of {n}"), &expected, |cpu| {
            let (mut p, mut m, mut v) = (buffer(cpu, &start), buffer(cpu, &vec![0.0; n]), buffer(cpu, &vec![0.0; n]));
            assert!((sum_squares(cpu, &p) - square).abs() <= 1e-12 * square);
            for (step, grad) in (1..).zip(&grads) {
                let settings = AdamW {
                    lr: lr as f32,
                    beta1: b1 as f32,
                    beta2: b2 as f32,
                    eps: eps as f32,
                    weight_decay: decay as f32,
                    step,
                };
                cpu.run(Call::AdamW { step: &settings, grad: &buffer(cpu, grad), param: &mut p, m: &mut m, v: &mut v })
                    .unwrap();
            }
            [p, m, v].map(|b| read(cpu, &b)).into()
        });
    }
}

#[test]
fn sgd_and_lion_meet_their_definitions_over_ten_steps() {
    let mut report = Report::default();
    let mut random = Random(28);
    let (lr, momentum, b1, b2, decay) = (1e-2_f64, 0.9_f64, 0.9_f64, 0.99_f64, 0.1);
    let sgd = |momentum: f64| Sgd { lr: lr as f32, momentum: momentum as f32, weight_decay: decay as f32 };
    let lion = Lion { lr: lr as f32, beta1: b1 as f32, beta2: b2 as f32, weight_decay: decay as f32 };
    for n in LENGTHS {
        if !affordable(n * 4) {
            continue;
        }
        let start = random.vector(n);
        let grads: Vec<Vec<f32>> = (0..10).map(|_| random.vector(n)).collect();
        let (mut plain, mut heavy, mut signed) = (wide(&start), wide(&start), wide(&start));
        let (mut m, mut along) = (vec![0.0; n], vec![0.0; n]);
        for grad in &grads {
            for i in 0..n {
                let g = f64::from(grad[i]);
                plain[i] = plain[i] * (1.0 - lr * decay) - lr * g;
                m[i] = momentum * m[i] + g;
                heavy[i] = heavy[i] * (1.0 - lr * decay) - lr * m[i];
                let update: f64 = b1 * along[i] + (1.0 - b1) * g;
                signed[i] -= lr * (update.signum() + decay * signed[i]);
                along[i] = b2 * along[i] + (1.0 - b2) * g;
            }
        }
        let expected = [plain, heavy, m, signed, along].map(|x| Expected::norm(x, 64.0 * EPS));
        case!(report, &format!("sgd, lion of {n}"), &expected, |cpu| {
            let [mut plain, mut heavy, mut signed] = [(); 3].map(|()| buffer(cpu, &start));
            let [mut m, mut along] = [(); 2].map(|()| buffer(cpu, &vec![0.0; n]));
            for grad in &grads {
                let grad = buffer(cpu, grad);
                cpu.run(Call::Sgd { step: &sgd(0.0), grad: &grad, param: &mut plain, m: None }).unwrap();
                cpu.run(Call::Sgd { step: &sgd(momentum), grad: &grad, param: &mut heavy, m: Some(&mut m) }).unwrap();
                cpu.run(Call::Lion { step: &lion, grad: &grad, param: &mut signed, m: &mut along }).unwrap();
            }
            [plain, heavy, m, signed, along].map(|b| read(cpu, &b)).into()
        });
    }
}

/// No gradient and no moment: no sign, no step.
#[test]
fn lion_leaves_alone_what_has_no_gradient() {
    let mut report = Report::default();
    let lion = Lion { lr: 0.5, beta1: 0.9, beta2: 0.99, weight_decay: 0.0 };
    let expected = [Expected::new(vec![3.0; 10], vec![0.0; 10])];
    case!(report, "lion at rest", &expected, |cpu| {
        let (mut param, mut m) = (buffer(cpu, &[3.0; 10]), buffer(cpu, &[0.0; 10]));
        cpu.run(Call::Lion { step: &lion, grad: &buffer(cpu, &[0.0; 10]), param: &mut param, m: &mut m }).unwrap();
        vec![read(cpu, &param)]
    });
}

/// A moment in 8 bits on the host.
#[derive(Clone)]
struct Moment {
    codes: Vec<u8>,
    absmax: Vec<f32>,
}

impl Moment {
    fn zeros(n: usize) -> Self {
        Self { codes: vec![0; n], absmax: vec![0.0; n.div_ceil(256)] }
    }

    fn decode(&self, map: &[f32; 256]) -> Vec<f64> {
        let value = |(i, c): (usize, &u8)| f64::from(map[*c as usize]) * f64::from(self.absmax[i / 256]);
        self.codes.iter().enumerate().map(value).collect()
    }

    fn on<B: Backend>(&self, device: &B, signed: bool) -> B::Codes {
        let mut codes = device.codes(self.codes.len(), signed).unwrap();
        device.write_codes(&mut codes, &self.codes, &self.absmax);
        codes
    }

    fn read<B: Backend>(&self, device: &B, codes: &B::Codes) -> Self {
        let mut out = self.clone();
        device.read_codes(codes, &mut out.codes, &mut out.absmax).unwrap();
        out
    }
}

/// Values, each with half the distance from its nearest map value to the farther neighbour as its bound, in units of the
/// block's absmax: what the nearest code may be off by.
fn coded(values: &[f64], map: &[f32; 256]) -> Expected {
    let bound = |i: usize| {
        let block = &values[i / 256 * 256..values.len().min((i / 256 + 1) * 256)];
        let absmax = block.iter().fold(0.0_f64, |most, x| most.max(x.abs()));
        let gap = |x: f64| {
            let at = map.iter().position(|v| f64::from(*v) >= x).unwrap_or(255).max(1);
            f64::from(map[at]) - f64::from(map[at - 1])
        };
        if absmax == 0.0 { 0.0 } else { absmax * (gap(values[i] / absmax) / 2.0 + 4.0 * EPS) }
    };
    Expected::new(values.to_vec(), (0..values.len()).map(bound).collect())
}

#[test]
fn adamw_in_8_bits_meets_its_definition() {
    let mut report = Report::default();
    let mut random = Random(29);
    let (lr, b1, b2, eps, decay) = (1e-2_f64, 0.9_f64, 0.999_f64, 1e-8, 0.01);
    let maps = [dynamic_map(), unsigned_dynamic_map()];
    for n in LENGTHS {
        if !affordable(n * 4) {
            continue;
        }
        let mut param = random.vector(n);
        let mut moments = [Moment::zeros(n), Moment::zeros(n)];
        for step in 1..=4 {
            // The second block, where there is one, has no gradient at first.
            let mut grad = random.vector(n);
            grad.iter_mut().skip(256).take(256).filter(|_| step < 3).for_each(|g| *g = 0.0);
            let [mut m, mut v] = [0, 1].map(|i| moments[i].decode(&maps[i]));
            let mut p = wide(&param);
            for i in 0..n {
                let g = f64::from(grad[i]);
                m[i] = b1 * m[i] + (1.0 - b1) * g;
                v[i] = b2 * v[i] + (1.0 - b2) * g * g;
                p[i] -= lr * decay * p[i];
                p[i] -= lr * (m[i] / (1.0 - b1.powi(step))) / ((v[i] / (1.0 - b2.powi(step))).sqrt() + eps);
            }
            let expected = [Expected::norm(p, 16.0 * EPS), coded(&m, &maps[0]), coded(&v, &maps[1])];
            let settings = AdamW {
                lr: lr as f32,
                beta1: b1 as f32,
                beta2: b2 as f32,
                eps: eps as f32,
                weight_decay: decay as f32,
                step: step as u32,
            };
            let one_step = |moments: &[Moment; 2]| {
                let cpu = pocketlora_kernels::Cpu::new(1);
                let mut p = buffer(&cpu, &param);
                let (mut m, mut v) = (moments[0].on(&cpu, true), moments[1].on(&cpu, false));
                cpu.run(Call::AdamW8 {
                    step: &settings,
                    grad: &buffer(&cpu, &grad),
                    param: &mut p,
                    m: &mut m,
                    v: &mut v,
                })
                .unwrap();
                (read(&cpu, &p), [moments[0].read(&cpu, &m), moments[1].read(&cpu, &v)])
            };
            case!(report, &format!("adamw8 of {n}, step {step}"), &expected, |cpu| {
                let mut p = buffer(cpu, &param);
                let (mut m, mut v) = (moments[0].on(cpu, true), moments[1].on(cpu, false));
                cpu.run(Call::AdamW8 {
                    step: &settings,
                    grad: &buffer(cpu, &grad),
                    param: &mut p,
                    m: &mut m,
                    v: &mut v,
                })
                .unwrap();
                let narrow = |x: Vec<f64>| x.iter().map(|x| *x as f32).collect();
                let [m, v] = [moments[0].read(cpu, &m).decode(&maps[0]), moments[1].read(cpu, &v).decode(&maps[1])];
                vec![read(cpu, &p), narrow(m), narrow(v)]
            });
            (param, moments) = one_step(&moments);
        }
    }
}

/// Each step starts from where bitsandbytes' was, so that a code that rounds the other way stays one.
#[test]
#[cfg_attr(miri, ignore = "too long")]
fn adamw_in_8_bits_does_what_bitsandbytes_does() {
    let file = SafeTensors::deserialize(GOLDEN).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let view = file.tensor(name).unwrap();
        view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let moment = |name: &str, step: usize| Moment {
        codes: file.tensor(&format!("{name}.codes.{step}")).unwrap().data().to_vec(),
        absmax: floats(&format!("{name}.absmax.{step}")),
    };
    let bits = |values: &[f32]| -> Vec<u32> { values.iter().map(|v| v.to_bits()).collect() };
    assert_eq!(bits(&floats("map")), bits(&unsigned_dynamic_map()));

    let cpu = pocketlora_kernels::Cpu::new(1);
    let (grads, n, maps) = (floats("grads"), 1000, [dynamic_map(), unsigned_dynamic_map()]);
    let (mut param, mut m, mut v) = (floats("start"), Moment::zeros(n), Moment::zeros(n));
    for (step, grad) in grads.chunks(n).enumerate() {
        let settings =
            AdamW { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01, step: step as u32 + 1 };
        let (mut p, mut first, mut second) = (buffer(&cpu, &param), m.on(&cpu, true), v.on(&cpu, false));
        cpu.run(Call::AdamW8 {
            step: &settings,
            grad: &buffer(&cpu, grad),
            param: &mut p,
            m: &mut first,
            v: &mut second,
        })
        .unwrap();
        let (got, expected) = (read(&cpu, &p), floats(&format!("param.{step}")));
        for (i, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert!((got - expected).abs() <= 4e-7 * expected.abs().max(1.0), "step {step} [{i}]: {got}, {expected}");
        }
        let theirs = [moment("m", step), moment("v", step)];
        let fresh = |stale: &Moment, map, beta: f64, power| -> Vec<f64> {
            let moved = |(x, g): (f64, &f32)| beta * x + (1.0 - beta) * f64::from(*g).powi(power);
            stale.decode(map).into_iter().zip(grad).map(moved).collect()
        };
        for (name, ours, theirs, map, fresh) in [
            ("m", m.read(&cpu, &first), &theirs[0], &maps[0], fresh(&m, &maps[0], 0.9, 1)),
            ("v", v.read(&cpu, &second), &theirs[1], &maps[1], fresh(&v, &maps[1], 0.999, 2)),
        ] {
            for (a, b) in ours.absmax.iter().zip(&theirs.absmax) {
                assert!((a - b).abs() <= 1e-6 * b, "step {step}, absmax of {name}: {a}, {b}");
            }
            // bitsandbytes takes another code for what lies within some 2e-5 of a midpoint. Ours is the nearest.
            for i in (0..n).filter(|i| theirs.absmax[i / 256] != 0.0) {
                let x = fresh[i] / f64::from(theirs.absmax[i / 256]);
                let off = |codes: &[u8]| (f64::from(map[usize::from(codes[i])]) - x).abs();
                let (ours, theirs) = (off(&ours.codes), off(&theirs.codes));
                assert!(
                    ours <= theirs + 4.0 * EPS && theirs <= ours + 4e-5,
                    "step {step}, {name} [{i}]: {ours:e}, {theirs:e} off"
                );
            }
        }
        param = expected;
        [m, v] = theirs;
    }
}
