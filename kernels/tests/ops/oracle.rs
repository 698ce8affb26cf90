//! Naive f64 versions of the ops, straight from the formulas of `call.rs`.

use pocketlora_kernels::Attention;

/// `x[T, K] wᵀ[O, K]` and the same with absolute values, from which bounds follow.
pub fn matmul(x: &[f64], w: &[f64], k: usize) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut size) = (Vec::new(), Vec::new());
    for x in x.chunks(k) {
        for w in w.chunks(k) {
            y.push(x.iter().zip(w).map(|(x, w)| x * w).sum());
            size.push(x.iter().zip(w).map(|(x, w)| (x * w).abs()).sum());
        }
    }
    (y, size)
}

/// Rows and columns exchanged.
pub fn transpose(x: &[f64], cols: usize) -> Vec<f64> {
    (0..cols).flat_map(|c| x.iter().skip(c).step_by(cols).copied()).collect()
}

pub fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}

/// Rows as wide as `w`, normed to mean 0 and variance 1, times `w` plus `b`.
pub fn layer_norm(w: &[f64], b: &[f64], eps: f64, x: &[f64]) -> Vec<f64> {
    let row = |x: &[f64]| {
        let mean = |of: &dyn Fn(f64) -> f64| x.iter().map(|x| of(*x)).sum::<f64>() / x.len() as f64;
        let middle = mean(&|x| x);
        let root = (mean(&|x| (x - middle).powi(2)) + eps).sqrt();
        x.iter().zip(w).zip(b).map(|((x, w), b)| (x - middle) / root * w + b).collect::<Vec<f64>>()
    };
    x.chunks(w.len()).flat_map(row).collect()
}

pub fn rms_norm(w: &[f64], eps: f64, x: &[f64]) -> Vec<f64> {
    let row = |x: &[f64]| {
        let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
        x.iter().zip(w).map(|(x, w)| x / (mean + eps).sqrt() * w).collect::<Vec<_>>()
    };
    x.chunks(w.len()).flat_map(row).collect()
}

pub fn silu(g: f64) -> f64 {
    g / (1.0 + (-g).exp())
}

/// In the tanh form.
pub fn gelu(g: f64) -> f64 {
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (g + 0.044715 * g.powi(3));
    0.5 * g * (1.0 + inner.tanh())
}

/// The gradient of `sum_i dy[i] f(x)[i]` by central differences: exact to some 1e-9 of the values' size.
pub fn gradient(x: &[f64], dy: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) -> Vec<f64> {
    let h = 1e-5;
    let value = |x: &[f64]| f(x).iter().zip(dy).map(|(y, dy)| y * dy).sum::<f64>();
    let mut x = x.to_vec();
    (0..x.len())
        .map(|i| {
            let at = x[i];
            x[i] = at + h;
            let above = value(&x);
            x[i] = at - h;
            let below = value(&x);
            x[i] = at;
            (above - below) / (2.0 * h)
        })
        .collect()
}

/// A scaled score as attention takes it.
fn capped(spec: &Attention, score: f64) -> f64 {
    spec.softcap.map(f64::from).map_or(score, |cap| cap * (score / cap).tanh())
}

/// What attention of the last `queries` of `keys` tokens yields: outputs `[T, H * D]` and log-sum-exps `[T, H]`.
pub fn attention(spec: &Attention, segments: &[usize], q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let d = spec.head_dim;
    let (keys, queries) = (k.len() / (spec.kv_heads * d), q.len() / (spec.heads * d));
    let segment_of = |t: usize| {
        let mut end = 0;
        segments.iter().position(|len| {
            end += len;
            t < end
        })
    };
    let (mut y, mut lse) = (Vec::new(), Vec::new());
    for i in 0..queries {
        let t = keys - queries + i;
        for head in 0..spec.heads {
            let g = head / (spec.heads / spec.kv_heads);
            let seen: Vec<usize> = (0..=t)
                .filter(|j| segment_of(*j) == segment_of(t) && spec.window.is_none_or(|window| t - j < window))
                .collect();
            let q = &q[(i * spec.heads + head) * d..][..d];
            let row = |x: &[f64], j: usize| x[(j * spec.kv_heads + g) * d..][..d].to_vec();
            let dot = |j: &usize| {
                capped(spec, q.iter().zip(row(k, *j)).map(|(q, k)| q * k).sum::<f64>() * f64::from(spec.scale))
            };
            let scores: Vec<f64> = seen.iter().map(dot).collect();
            let p = softmax(&scores);
            y.extend((0..d).map(|c| p.iter().zip(&seen).map(|(p, j)| p * row(v, *j)[c]).sum::<f64>()));
            lse.push(scores.iter().map(|s| s.exp()).sum::<f64>().ln());
        }
    }
    (y, lse)
}

/// `dq`, `dk`, `dv` of `sum dy * y`, one query at a time with the softmax's Jacobian.
pub fn attention_vjp(
    spec: &Attention,
    segments: &[usize],
    q: &[f64],
    k: &[f64],
    v: &[f64],
    dy: &[f64],
) -> [Vec<f64>; 3] {
    let (d, scale) = (spec.head_dim, f64::from(spec.scale));
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let mut start = 0;
    for len in segments {
        for t in start..start + len {
            let first = spec.window.map_or(start, |window| start.max((t + 1).saturating_sub(window)));
            for head in 0..spec.heads {
                let g = head / (spec.heads / spec.kv_heads);
                let query = (t * spec.heads + head) * d;
                let key = |j: usize| (j * spec.kv_heads + g) * d;
                let dot = |a: &[f64], i: usize, b: &[f64], j: usize| (0..d).map(|c| a[i + c] * b[j + c]).sum::<f64>();
                let scores: Vec<f64> = (first..=t).map(|j| capped(spec, scale * dot(q, query, k, key(j)))).collect();
                let p = softmax(&scores);
                let dp: Vec<f64> = (first..=t).map(|j| dot(dy, query, v, key(j))).collect();
                let mean: f64 = p.iter().zip(&dp).map(|(p, dp)| p * dp).sum();
                for (n, j) in (first..=t).enumerate() {
                    let slope = spec.softcap.map_or(1.0, |cap| 1.0 - (scores[n] / f64::from(cap)).powi(2));
                    let ds = scale * slope * p[n] * (dp[n] - mean);
                    for c in 0..d {
                        dq[query + c] += ds * k[key(j) + c];
                        dk[key(j) + c] += ds * q[query + c];
                        dv[key(j) + c] += p[n] * dy[query + c];
                    }
                }
            }
        }
        start += len;
    }
    [dq, dk, dv]
}
