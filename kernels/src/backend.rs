//! The list of operations a device must offer, with their shapes.
//!
//! Letters: `T` tokens (rows of activations), `C` width, `O` output rows of a weight, `K` its input
//! columns, `V` vocabulary, `H` query heads, `G` key/value heads, `D` head width. Activations are f32,
//! row-major `[T, C]`. Weights are row-major `[O, K]`, as checkpoints store them.
//!
//! A backend may record work instead of doing it: only [`Backend::read`] and [`Backend::sum_squares`] have to wait for
//! it. Operations cannot fail; a device that is lost meanwhile says so at the next of those two. A buffer or matrix may
//! be dropped before recorded work that uses it is done. Buffers and matrices belong to the device; the caller never
//! sees their memory. Shapes follow from buffer lengths, and a wrong one is a bug in the caller: every method asserts it at
//! the door. Outputs that are not said to be accumulated are overwritten whatever they held before.

use crate::{Error, MatrixSource};

/// Rows of logits that the body of [`Backend::linear_cross_entropy`] holds at once.
const LOGIT_ROWS: usize = 64;

/// Arithmetic of the products with weights. Results are f32 in all of them. A device that lacks one takes a more exact
/// one instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Arithmetic {
    /// f32 products and sums, of the weights' exact values.
    #[default]
    Exact,
    /// Products of operands rounded to bf16, summed in f32; f32 where the device has no such instruction.
    Bf16,
    /// Products of activations rounded to 8 bits per 64 elements with 8-bit codes of the weight, summed exactly within
    /// such a block. For weights in 4 or 8 bits whose rows are whole blocks; exact for all others.
    Int8,
}

/// Number type of a key/value cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheType {
    /// 4 bytes an element, no rounding.
    F32,
    /// 2 bytes an element.
    F16,
    /// 1 byte an element and a scale for each head's row.
    I8,
}

/// Number type of a small trainable matrix as forward and backward see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkType {
    /// The f32 master itself.
    F32,
    /// The master rounded to f16, as the adapter file will hold it.
    F16,
}

/// Shape and masking of one attention call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Attention {
    /// Query heads (`H`), a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads (`G`).
    pub kv_heads: usize,
    /// Width of one head (`D`).
    pub head_dim: usize,
    /// Factor on the scores before the softmax, usually `1 / sqrt(D)`.
    pub scale: f32,
    /// A query sees the last `window` keys, itself included; `None` sees all before it.
    pub window: Option<usize>,
}

/// AdamW's settings for one step (Loshchilov & Hutter 2019, decoupled decay, as torch.optim.AdamW).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f32,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to the root of the second moment.
    pub eps: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
    /// 1-based number of this step, for bias correction.
    pub step: u32,
}

/// SGD's settings for one step, with decoupled decay.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sgd {
    /// Learning rate of this step.
    pub lr: f32,
    /// What is kept of the moment.
    pub momentum: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

/// Lion's settings for one step (Chen et al. 2023).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Lion {
    /// Learning rate of this step.
    pub lr: f32,
    /// Share of the moment in the update.
    pub beta1: f32,
    /// Decay of the moment.
    pub beta2: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

/// Elements of a moment in 8 bits that share an absmax.
pub const MOMENT_BLOCK: usize = 256;

/// `scale (x Aᵀ) Bᵀ`, what a low-rank adapter adds to a product: `a` is `[r, K]`, `b` `[O, r]`.
pub struct LowRank<'a, B: Backend + ?Sized> {
    /// Down to the rank.
    pub a: &'a B::Matrix,
    /// Up from it.
    pub b: &'a B::Matrix,
    /// Factor on the whole.
    pub scale: f32,
}

/// One of several products of the same `x`, see [`Backend::matmul_group`].
pub struct Product<'a, B: Backend + ?Sized> {
    /// `[O, K]`.
    pub w: &'a B::Matrix,
    /// Added to `x Wᵀ`.
    pub low_rank: Vec<LowRank<'a, B>>,
    /// `[T, O]`, overwritten.
    pub y: &'a mut B::Buffer,
}

/// Values that a row of `width` takes when packed by [`Backend::narrow`]: its unit, and pairs.
#[must_use]
pub const fn narrow_width(width: usize) -> usize {
    1 + width.div_ceil(2)
}

/// A device that runs Pocketlora's operations. See the module text for the conventions.
pub trait Backend: Send + Sync + 'static {
    /// An f32 array on the device.
    type Buffer: Send + Sync;
    /// A weight matrix `[O, K]` on the device, or mapped by it.
    type Matrix: Send + Sync;
    /// Keys and values of one layer.
    type Cache: Send + Sync;
    /// An array in 8 bits: a code for each element, an absmax for each [`MOMENT_BLOCK`] of them.
    type Codes: Send + Sync;

    /// Runs `work` with this backend's threads, so that ops inside it need not wake them one by one.
    fn scope<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R
    where
        Self: Sized;

    /// Threads that operations run on.
    fn threads(&self) -> usize {
        1
    }
    /// A buffer of `len` zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn buffer(&self, len: usize) -> Result<Self::Buffer, Error>;
    /// Number of f32 in `buffer`.
    fn len(&self, buffer: &Self::Buffer) -> usize;
    /// A buffer of `len` zeros to cut others from, where the device can do that.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn region(&self, len: usize) -> Result<Self::Buffer, Error> {
        self.buffer(len)
    }
    /// Length that [`Backend::cut`] can give `buffer` at most.
    fn capacity(&self, buffer: &Self::Buffer) -> usize {
        self.len(buffer)
    }
    /// A buffer of `len` values from the beginning of `buffer`'s memory, and one of what is left of it, if anything is. The
    /// buffer comes back where its device cannot give it that length. What the parts hold is unspecified.
    #[expect(clippy::type_complexity, reason = "a name for it would hide what comes back")]
    fn cut(&self, buffer: Self::Buffer, len: usize) -> Result<(Self::Buffer, Option<Self::Buffer>), Self::Buffer> {
        if self.len(&buffer) == len { Ok((buffer, None)) } else { Err(buffer) }
    }
    /// Undoes [`Backend::cut`]; both come back if `second` does not lie right behind `first`.
    fn join(&self, first: Self::Buffer, second: Self::Buffer) -> Result<Self::Buffer, (Self::Buffer, Self::Buffer)> {
        Err((first, second))
    }
    /// A number that orders buffers as they lie in memory.
    fn address(&self, buffer: &Self::Buffer) -> usize {
        let _ = buffer;
        0
    }
    /// Copies host values in; lengths are equal.
    fn write(&self, dst: &mut Self::Buffer, src: &[f32]);
    /// Waits for the work recorded so far and copies `src` out; lengths are equal.
    ///
    /// # Errors
    /// [`Error::Device`] if the device was lost.
    fn read(&self, src: &Self::Buffer, dst: &mut [f32]) -> Result<(), Error>;

    /// Takes a frozen weight as a file holds it: mapped where the device can, copied where it cannot.
    ///
    /// # Errors
    /// [`Error::Matrix`] if its parts do not fit its shape, [`Error::OutOfMemory`].
    fn matrix(&self, source: MatrixSource) -> Result<Self::Matrix, Error>;
    /// A small matrix `[rows, cols]` of zeros that [`Backend::set_matrix`] fills.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn work_matrix(&self, rows: usize, cols: usize, dtype: WorkType) -> Result<Self::Matrix, Error>;
    /// Rounds `master` (`rows * cols` values) into a matrix made by [`Backend::work_matrix`].
    fn set_matrix(&self, dst: &mut Self::Matrix, master: &Self::Buffer);
    /// Lends the values of a matrix made as [`WorkType::F32`]: products see at once what `work` does to them.
    fn with_values(&self, matrix: &mut Self::Matrix, work: &mut dyn FnMut(&mut Self::Buffer));
    /// Waits for the work recorded so far and copies the values of a matrix made as [`WorkType::F32`] out.
    ///
    /// # Errors
    /// As [`Backend::read`].
    fn read_matrix(&self, matrix: &Self::Matrix, dst: &mut [f32]) -> Result<(), Error>;
    /// `(O, K)` of a matrix.
    fn shape(&self, matrix: &Self::Matrix) -> (usize, usize);

    /// `y[t, :] = table[ids[t], :]`.
    fn embed(&self, table: &Self::Matrix, ids: &[u32], y: &mut Self::Buffer);
    /// `y[t, :] = x[rows[t], :]`; `y` is `[rows.len(), C]`.
    fn gather_rows(&self, x: &Self::Buffer, rows: &[u32], y: &mut Self::Buffer);
    /// `y[rows[t], :] += x[t, :]`; `rows` are distinct.
    fn scatter_add_rows(&self, x: &Self::Buffer, rows: &[u32], y: &mut Self::Buffer);

    /// `y[T, O] = x[T, K] Wᵀ`, added to `y` if `accumulate`.
    fn matmul(
        &self,
        arithmetic: Arithmetic,
        w: &Self::Matrix,
        x: &Self::Buffer,
        y: &mut Self::Buffer,
        accumulate: bool,
    );
    /// `y[T, O] = x[T, K] Wᵀ + ` the low-rank terms, for each of `products`: a layer that multiplies the same `x` by
    /// several weights says so at once, so that a device reads `x` once and starts its threads once.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn matmul_group(
        &self,
        arithmetic: Arithmetic,
        x: &Self::Buffer,
        products: &mut [Product<'_, Self>],
    ) -> Result<(), Error> {
        for Product { w, low_rank, y } in products {
            self.matmul(arithmetic, w, x, y, false);
            let (_, width) = self.shape(w);
            for LowRank { a, b, scale } in low_rank {
                let (rank, _) = self.shape(a);
                let tokens = self.len(x).checked_div(width).unwrap_or(0);
                let mut h = self.buffer(tokens * rank)?;
                self.matmul(arithmetic, a, x, &mut h, false);
                self.scale(*scale, &mut h);
                self.matmul(arithmetic, b, &h, y, true);
            }
        }
        Ok(())
    }
    /// `dx[T, K] = dy[T, O] W`, added to `dx` if `accumulate`. [`Arithmetic::Int8`] is too coarse for gradients and taken
    /// as exact.
    fn matmul_vjp_x(
        &self,
        arithmetic: Arithmetic,
        w: &Self::Matrix,
        dy: &Self::Buffer,
        dx: &mut Self::Buffer,
        accumulate: bool,
    );
    /// `dx[T, K] = ` the sum of `dy[T, O] W` over `terms` of `(W, dy)`, added to `dx` if `accumulate`: what a weight and
    /// the way down of its adapter pass on, for which a device touches `dx` once.
    fn matmul_vjp_x_sum(
        &self,
        arithmetic: Arithmetic,
        terms: &[(&Self::Matrix, &Self::Buffer)],
        dx: &mut Self::Buffer,
        accumulate: bool,
    ) {
        for (i, (w, dy)) in terms.iter().enumerate() {
            self.matmul_vjp_x(arithmetic, w, dy, dx, accumulate || i > 0);
        }
    }
    /// `dw[O, K] += dy[T, O]ᵀ x[T, K]`.
    fn matmul_vjp_w(&self, tokens: usize, dy: &Self::Buffer, x: &Self::Buffer, dw: &mut Self::Buffer);

    /// `y[t, :] += bias`.
    fn add_bias(&self, bias: &Self::Buffer, y: &mut Self::Buffer);
    /// `y = a + b`.
    fn add(&self, a: &Self::Buffer, b: &Self::Buffer, y: &mut Self::Buffer);
    /// `y += x`.
    fn add_assign(&self, x: &Self::Buffer, y: &mut Self::Buffer);
    /// `x *= factor`.
    fn scale(&self, factor: f32, x: &mut Self::Buffer);
    /// `y = x / (1 - p)` with elements dropped to zero with probability `p`; which ones is a function of `key` and
    /// the element's index alone, counted from `first` for the first of `x`.
    fn dropout(&self, p: f32, key: u64, first: u64, x: &Self::Buffer, y: &mut Self::Buffer);
    /// `y = x`.
    fn copy(&self, x: &Self::Buffer, y: &mut Self::Buffer);
    /// Packs rows of `width` in 16 bits, each with a power of two as its unit, so that none overflows. `y` has
    /// [`narrow_width`] values for each row.
    fn narrow(&self, width: usize, x: &Self::Buffer, y: &mut Self::Buffer);
    /// What [`Backend::narrow`] packed, rounded to 11 bits of mantissa.
    fn widen(&self, width: usize, x: &Self::Buffer, y: &mut Self::Buffer);
    /// Sets all of `x` to zero.
    fn zero(&self, x: &mut Self::Buffer);

    /// `y = x / sqrt(mean(x²) + eps) * w`, row by row (Zhang & Sennrich 2019); `w` is `[C]`.
    fn rms_norm(&self, w: &Self::Buffer, eps: f32, x: &Self::Buffer, y: &mut Self::Buffer);
    /// `dx += ` the gradient of [`Backend::rms_norm`] by `x`; `w` is frozen.
    fn rms_norm_vjp_x(&self, w: &Self::Buffer, eps: f32, x: &Self::Buffer, dy: &Self::Buffer, dx: &mut Self::Buffer);

    /// Rotates each head (`D` = `head_dim`) of `x` `[T, heads * D]` by the angles whose `cos` and `sin` are `[T, D / 2]`,
    /// pairing element `i` with `i + D / 2` as Hugging Face checkpoints do (Su et al. 2021). `inverse`
    /// turns back, which is also the gradient.
    fn rope(
        &self,
        heads: usize,
        head_dim: usize,
        cos: &Self::Buffer,
        sin: &Self::Buffer,
        x: &Self::Buffer,
        inverse: bool,
        y: &mut Self::Buffer,
    );

    /// `y = gelu(gate) * up` with the tanh form of GELU (Shazeer 2020, Hendrycks & Gimpel 2016).
    fn geglu(&self, gate: &Self::Buffer, up: &Self::Buffer, y: &mut Self::Buffer);
    /// Gradient of [`Backend::geglu`]; `dgate` and `dup` are overwritten.
    fn geglu_vjp(
        &self,
        gate: &Self::Buffer,
        up: &Self::Buffer,
        dy: &Self::Buffer,
        dgate: &mut Self::Buffer,
        dup: &mut Self::Buffer,
    );
    /// `y = silu(gate) * up` (Shazeer 2020).
    fn swiglu(&self, gate: &Self::Buffer, up: &Self::Buffer, y: &mut Self::Buffer);
    /// Gradient of [`Backend::swiglu`]; `dgate` and `dup` are overwritten.
    fn swiglu_vjp(
        &self,
        gate: &Self::Buffer,
        up: &Self::Buffer,
        dy: &Self::Buffer,
        dgate: &mut Self::Buffer,
        dup: &mut Self::Buffer,
    );

    /// As [`Backend::swiglu_vjp`], with the gradients in the place of what they belong to.
    fn swiglu_vjp_in_place(&self, dy: &Self::Buffer, gate: &mut Self::Buffer, up: &mut Self::Buffer);

    /// Causal attention inside each of `segments` (lengths that sum to `T`); no token sees another segment.
    /// `q`, `y` are `[T, H * D]`, `k`, `v` `[T, G * D]`; `lse` `[T, H]` receives the log-sum-exp of the
    /// scaled scores, which is all that backward needs besides `y` (Dao et al. 2022).
    fn attention(
        &self,
        spec: &Attention,
        segments: &[usize],
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        y: &mut Self::Buffer,
        lse: &mut Self::Buffer,
    );
    /// Gradient of [`Backend::attention`]: recomputes scores block by block; overwrites `dq`, `dk`, `dv`.
    fn attention_vjp(
        &self,
        spec: &Attention,
        segments: &[usize],
        q: &Self::Buffer,
        k: &Self::Buffer,
        v: &Self::Buffer,
        y: &Self::Buffer,
        lse: &Self::Buffer,
        dy: &Self::Buffer,
        dq: &mut Self::Buffer,
        dk: &mut Self::Buffer,
        dv: &mut Self::Buffer,
    );

    /// An empty cache of `kv_heads` rows of `head_dim` a token for keys and as many for values; it grows as needed.
    fn cache(&self, kv_heads: usize, head_dim: usize, dtype: CacheType) -> Self::Cache;
    /// Tokens held.
    fn cache_len(&self, cache: &Self::Cache) -> usize;
    /// Appends the rows of `k` and `v`.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; the cache is unchanged then.
    fn cache_append(&self, cache: &mut Self::Cache, k: &Self::Buffer, v: &Self::Buffer) -> Result<(), Error>;
    /// Keeps the first `len` tokens.
    fn cache_truncate(&self, cache: &mut Self::Cache, len: usize);
    /// Causal attention of the last `T` cached tokens, whose queries are `q` `[T, H * D]`, over the cache.
    fn attention_cached(&self, spec: &Attention, q: &Self::Buffer, cache: &Self::Cache, y: &mut Self::Buffer);

    /// For each row of `logits` `[N, V]`: `losses[n] = -log softmax(logits[n])[targets[n]]` (natural log);
    /// then the row becomes the gradient of `scale * losses[n]`.
    fn cross_entropy(&self, targets: &[u32], scale: f32, logits: &mut Self::Buffer, losses: &mut Self::Buffer);
    /// Cross-entropy of a linear head, without its logits in memory: with `l = x Wᵀ` of `x` `[N, C]` and `w` `[V, C]`,
    /// `losses[n] = -log softmax(l[n])[targets[n]]` (natural log), and `dx` `[N, C]`, where there is one, becomes the
    /// gradient of `scale * sum(losses)` by `x`. [`Arithmetic::Int8`] is too coarse for it and taken as exact.
    ///
    /// As in blockwise attention, a device may walk the vocabulary with a running maximum `m` and sum `Z` of each row and
    /// add up `sum_v e^(l_v - m) W_v` (Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models").
    /// The body here, for devices without such a kernel, takes a few rows at a time through all of the vocabulary.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn linear_cross_entropy(
        &self,
        arithmetic: Arithmetic,
        w: &Self::Matrix,
        targets: &[u32],
        scale: f32,
        x: &Self::Buffer,
        losses: &mut Self::Buffer,
        mut dx: Option<&mut Self::Buffer>,
    ) -> Result<(), Error> {
        let arithmetic = if arithmetic == Arithmetic::Int8 { Arithmetic::Exact } else { arithmetic };
        let (vocab, width) = self.shape(w);
        self.zero(losses);
        if let Some(dx) = dx.as_deref_mut() {
            self.zero(dx);
        }
        let all: Vec<u32> = (0..targets.len() as u32).collect();
        for (rows, targets) in all.chunks(LOGIT_ROWS).zip(targets.chunks(LOGIT_ROWS)) {
            let (mut part, mut logits) = (self.buffer(rows.len() * width)?, self.buffer(rows.len() * vocab)?);
            let mut part_losses = self.buffer(rows.len())?;
            self.gather_rows(x, rows, &mut part);
            self.matmul(arithmetic, w, &part, &mut logits, false);
            self.cross_entropy(targets, scale, &mut logits, &mut part_losses);
            self.scatter_add_rows(&part_losses, rows, losses);
            if let Some(dx) = dx.as_deref_mut() {
                self.matmul_vjp_x(arithmetic, w, &logits, &mut part, false);
                self.scatter_add_rows(&part, rows, dx);
            }
        }
        Ok(())
    }
    /// Bytes that [`Backend::linear_cross_entropy`] takes beside its arguments for `rows` of `width` and `vocab` logits.
    fn linear_cross_entropy_bytes(&self, rows: usize, width: usize, vocab: usize) -> usize {
        size_of::<f32>() * rows.min(LOGIT_ROWS) * (width + vocab + 1)
    }
    /// Sum of squares, in f64 and in an order that does not depend on the thread count.
    ///
    /// # Errors
    /// As [`Backend::read`].
    fn sum_squares(&self, x: &Self::Buffer) -> Result<f64, Error>;
    /// One AdamW step on `param` with first and second moments `m` and `v`.
    fn adamw(
        &self,
        step: &AdamW,
        grad: &Self::Buffer,
        param: &mut Self::Buffer,
        m: &mut Self::Buffer,
        v: &mut Self::Buffer,
    );
    /// One step of SGD on `param`, with a moment `m` that starts at zero, or without one.
    fn sgd(&self, step: &Sgd, grad: &Self::Buffer, param: &mut Self::Buffer, m: Option<&mut Self::Buffer>);
    /// One Lion step on `param` with moment `m`.
    fn lion(&self, step: &Lion, grad: &Self::Buffer, param: &mut Self::Buffer, m: &mut Self::Buffer);

    /// `len` zeros in 8 bits, coded with the signed dynamic map or the unsigned one (Dettmers et al. 2021).
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    fn codes(&self, len: usize, signed: bool) -> Result<Self::Codes, Error>;
    /// Number of elements.
    fn codes_len(&self, codes: &Self::Codes) -> usize;
    /// Copies codes and absmax out; lengths are equal.
    ///
    /// # Errors
    /// As [`Backend::read`].
    fn read_codes(&self, src: &Self::Codes, codes: &mut [u8], absmax: &mut [f32]) -> Result<(), Error>;
    /// Copies codes and absmax in; lengths are equal.
    fn write_codes(&self, dst: &mut Self::Codes, codes: &[u8], absmax: &[f32]);
    /// As [`Backend::adamw`] with moments in 8 bits, `m` signed and `v` unsigned.
    fn adamw8(
        &self,
        step: &AdamW,
        grad: &Self::Buffer,
        param: &mut Self::Buffer,
        m: &mut Self::Codes,
        v: &mut Self::Codes,
    );
}
