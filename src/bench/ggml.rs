//! ggml and llama.cpp through their C interface: one of the borders where unsafe code lives.
//!
//! Everything that leaves this file is safe. Objects are freed when dropped; none is shared between threads.

#![allow(unsafe_code, reason = "calls to C")]

use crate::error::{Error, ErrorCode, Result};
use llama_cpp_sys_2 as sys;
use pocketlora_kernels::cpu::Isa;
use std::ffi::{CStr, CString, c_char, c_void};
use std::path::Path;
use std::ptr::{NonNull, null, null_mut};
use std::sync::{Mutex, Once, PoisonError};

/// The 4-bit types of ggml that compete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quant {
    /// 32 weights and a scale: 4.5 bits.
    Q4_0,
    /// The same size with a codebook much like NF4's.
    Iq4Nl,
    /// 256 weights in eight blocks with 6-bit scales and minima: 4.5 bits. As a whole model's type the mixture `Q4_K_M`.
    Q4K,
}

impl Quant {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Q4_0, Self::Iq4Nl, Self::Q4K];

    /// The name that people use for files of this type.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "q4_0",
            Self::Iq4Nl => "iq4_nl",
            Self::Q4K => "q4_k_m",
        }
    }

    fn id(self) -> sys::ggml_type {
        match self {
            Self::Q4_0 => sys::GGML_TYPE_Q4_0,
            Self::Iq4Nl => sys::GGML_TYPE_IQ4_NL,
            Self::Q4K => sys::GGML_TYPE_Q4_K,
        }
    }

    fn file_type(self) -> sys::llama_ftype {
        match self {
            Self::Q4_0 => sys::LLAMA_FTYPE_MOSTLY_Q4_0,
            Self::Iq4Nl => sys::LLAMA_FTYPE_MOSTLY_IQ4_NL,
            Self::Q4K => sys::LLAMA_FTYPE_MOSTLY_Q4_K_M,
        }
    }
}

impl std::str::FromStr for Quant {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|q| q.name() == name);
        found.ok_or_else(|| Error::config("gguf-types", "`q4_0`, `iq4_nl` or `q4_k_m`", name))
    }
}

/// The last error that llama.cpp told its log.
static LAST_ERROR: Mutex<String> = Mutex::new(String::new());

/// Takes llama.cpp's log messages in place of stderr.
unsafe extern "C" fn on_log(level: sys::ggml_log_level, text: *const c_char, _: *mut c_void) {
    if level == sys::GGML_LOG_LEVEL_ERROR && !text.is_null() {
        // SAFETY: ggml hands over a string that ends with a zero and lives for the call.
        let text = unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned();
        *LAST_ERROR.lock().unwrap_or_else(PoisonError::into_inner) = text;
    }
}

fn start() {
    static START: Once = Once::new();
    // SAFETY: called once, before anything else of the library; the callback is a function, hence never freed.
    START.call_once(|| unsafe {
        sys::llama_log_set(Some(on_log), null_mut());
        sys::llama_backend_init();
        sys::ggml_cpu_init();
    });
}

fn failed(what: &str) -> Error {
    let told = LAST_ERROR.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let told = if told.is_empty() { "gave no reason".to_owned() } else { format!("says `{told}`") };
    Error::new(ErrorCode::Device, "llama.cpp", format!("could not {what}; it {told}"))
}

fn not_null<T>(pointer: *mut T, what: &str) -> Result<NonNull<T>> {
    NonNull::new(pointer).ok_or_else(|| failed(what))
}

/// What the library was built for, and its version.
#[must_use]
pub fn system() -> (String, String) {
    start();
    // SAFETY: all three return static strings.
    let text = |p| unsafe { CStr::from_ptr(p) }.to_string_lossy().trim().to_owned();
    // SAFETY: no arguments, no state.
    let (info, version, commit) = unsafe { (sys::llama_print_system_info(), sys::ggml_version(), sys::ggml_commit()) };
    (text(info), format!("{} ({})", text(version), text(commit)))
}

/// Instructions that this CPU has, kernels for `ours` may use and the library was built without: with any of these a
/// comparison would be unfair.
#[must_use]
pub fn missing_instructions(ours: Isa) -> Vec<&'static str> {
    start();
    let lacks = |built: unsafe extern "C" fn() -> i32| {
        // SAFETY: no arguments; it returns a constant of the build.
        unsafe { built() == 0 }
    };
    #[cfg(target_arch = "x86_64")]
    let features = [
        ("avx2", Isa::Avx2, is_x86_feature_detected!("avx2") && lacks(sys::ggml_cpu_has_avx2)),
        ("fma", Isa::Avx2, is_x86_feature_detected!("fma") && lacks(sys::ggml_cpu_has_fma)),
        ("f16c", Isa::Avx2, is_x86_feature_detected!("f16c") && lacks(sys::ggml_cpu_has_f16c)),
        ("avx_vnni", Isa::AvxVnni, is_x86_feature_detected!("avxvnni") && lacks(sys::ggml_cpu_has_avx_vnni)),
        ("avx512f", Isa::Avx512, is_x86_feature_detected!("avx512f") && lacks(sys::ggml_cpu_has_avx512)),
        ("avx512vnni", Isa::Avx512, is_x86_feature_detected!("avx512vnni") && lacks(sys::ggml_cpu_has_avx512_vnni)),
        ("avx512bf16", Isa::Avx512, is_x86_feature_detected!("avx512bf16") && lacks(sys::ggml_cpu_has_avx512_bf16)),
    ];
    #[cfg(target_arch = "aarch64")]
    let features = [
        ("dotprod", Isa::Neon, std::arch::is_aarch64_feature_detected!("dotprod") && lacks(sys::ggml_cpu_has_dotprod)),
        ("i8mm", Isa::Neon, std::arch::is_aarch64_feature_detected!("i8mm") && lacks(sys::ggml_cpu_has_matmul_int8)),
    ];
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let features: [(&str, Isa, bool); 0] = [];
    features.into_iter().filter(|(_, isa, missing)| *missing && *isa <= ours).map(|(name, ..)| name).collect()
}

/// `values` in blocks of `quant`, rows of `cols`; `None` if rows are no whole blocks.
fn quantize(quant: Quant, values: &[f32], cols: usize) -> Option<Vec<u8>> {
    // SAFETY: pure functions of a valid type.
    let (block, row) = unsafe { (sys::ggml_blck_size(quant.id()) as usize, |n| sys::ggml_row_size(quant.id(), n)) };
    if cols == 0 || !cols.is_multiple_of(block) || !values.len().is_multiple_of(cols) {
        return None;
    }
    let rows = values.len() / cols;
    let mut bytes = vec![0; rows * row(cols as i64)];
    // SAFETY: `values` has `rows * cols` floats, `bytes` room for as many rows; no importance matrix is needed here.
    let written = unsafe {
        let (from, to) = (values.as_ptr(), bytes.as_mut_ptr().cast());
        sys::ggml_quantize_chunk(quant.id(), from, to, 0, rows as i64, cols as i64, null())
    };
    assert_eq!(written, bytes.len(), "ggml wrote another size than it announced");
    Some(bytes)
}

/// Dequantizes whole blocks of the type numbered `id` in GGUF files; `None` if this ggml has no such conversion or the
/// lengths do not agree. For checks of our own.
#[must_use]
pub fn dequantize(id: u32, bytes: &[u8], len: usize) -> Option<Vec<f32>> {
    start();
    if id >= sys::GGML_TYPE_COUNT {
        return None;
    }
    // SAFETY: `id` is a type; the table is static.
    let traits = unsafe { &*sys::ggml_get_type_traits(id) };
    let (block, size) = (usize::try_from(traits.blck_size).ok()?, traits.type_size);
    if block == 0 || !len.is_multiple_of(block) || len / block * size != bytes.len() {
        return None;
    }
    let mut out = vec![0.0; len];
    let to_float = traits.to_float?;
    // SAFETY: `bytes` holds the blocks of `len` values, checked above, and `out` has room for them.
    unsafe { to_float(bytes.as_ptr().cast(), out.as_mut_ptr(), len as i64) };
    Some(out)
}

/// Products of one `x` with several equal weights, as a graph that the CPU backend runs.
pub struct Products {
    graph: NonNull<sys::ggml_cgraph>,
    backend: NonNull<sys::ggml_backend>,
    y: NonNull<sys::ggml_tensor>,
    repacked: bool,
    bytes: usize,
    /// What graph and tensors lie in.
    _weights: Arena,
    _values: Arena,
}

/// Tensors with the memory behind them.
struct Arena {
    context: NonNull<sys::ggml_context>,
    buffer: *mut sys::ggml_backend_buffer,
}

impl Arena {
    /// Descriptions of up to `tensors` tensors and one graph.
    fn new(tensors: usize) -> Result<Self> {
        // SAFETY: pure functions.
        let size = unsafe { sys::ggml_tensor_overhead() * tensors + sys::ggml_graph_overhead_custom(tensors, false) };
        let params = sys::ggml_init_params { mem_size: size, mem_buffer: null_mut(), no_alloc: true };
        // SAFETY: ggml allocates by itself where no memory is given.
        let context = not_null(unsafe { sys::ggml_init(params) }, "make a context")?;
        Ok(Self { context, buffer: null_mut() })
    }

    /// Memory of kind `kind` for all tensors described so far.
    fn allocate(&mut self, kind: sys::ggml_backend_buffer_type_t) -> Result<()> {
        assert!(self.buffer.is_null(), "tensors get their memory once");
        // SAFETY: the context is alive, `kind` is one that the library handed out.
        let buffer = unsafe { sys::ggml_backend_alloc_ctx_tensors_from_buft(self.context.as_ptr(), kind) };
        self.buffer = not_null(buffer, "allocate tensors")?.as_ptr();
        Ok(())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: both are ours and freed once; freeing no buffer does nothing.
        unsafe {
            sys::ggml_backend_buffer_free(self.buffer);
            sys::ggml_free(self.context.as_ptr());
        }
    }
}

impl Products {
    /// `count` weights `[rows, cols]` of random values in blocks of `quant`, times `tokens` rows, on `threads` threads;
    /// `None` if a row is no whole number of blocks.
    ///
    /// # Errors
    /// Out of memory.
    pub fn new(
        quant: Quant,
        (rows, cols): (usize, usize),
        count: usize,
        tokens: usize,
        threads: usize,
    ) -> Result<Option<Self>> {
        start();
        let mut rng = crate::rng::Rng::new(7);
        let values: Vec<f32> = (0..rows * cols).map(|_| (rng.unit() - 0.5) * 0.1).collect();
        let Some(bytes) = quantize(quant, &values, cols) else { return Ok(None) };
        let x: Vec<f32> = (0..tokens * cols).map(|_| rng.unit() - 0.5).collect();
        Self::with(quant, (rows, cols), &bytes, count, &x, threads).map(Some)
    }

    fn with(
        quant: Quant,
        (rows, cols): (usize, usize),
        bytes: &[u8],
        count: usize,
        x: &[f32],
        threads: usize,
    ) -> Result<Self> {
        let tokens = x.len() / cols;
        let mut weights = Arena::new(count)?;
        let mut values = Arena::new(2 * count + 1)?;
        // SAFETY: both contexts have room for the tensors made here, which live as long as they do; the graph has room
        // for `2 * count + 1` nodes.
        let (graph, x_tensor, pairs) = unsafe {
            let context = values.context.as_ptr();
            let x = sys::ggml_new_tensor_2d(context, sys::GGML_TYPE_F32, cols as i64, tokens as i64);
            let x = not_null(x, "make a tensor")?;
            let graph = not_null(sys::ggml_new_graph_custom(context, 2 * count + 1, false), "make a graph")?;
            let mut pairs = Vec::with_capacity(count);
            for _ in 0..count {
                let w = sys::ggml_new_tensor_2d(weights.context.as_ptr(), quant.id(), cols as i64, rows as i64);
                let w = not_null(w, "make a tensor")?;
                let y = not_null(sys::ggml_mul_mat(context, w.as_ptr(), x.as_ptr()), "make a product")?;
                sys::ggml_build_forward_expand(graph.as_ptr(), y.as_ptr());
                pairs.push((w, y));
            }
            (graph, x, pairs)
        };
        let Some(&(w, y)) = pairs.first() else { return Err(failed("multiply by no weights")) };

        // SAFETY: no arguments, or the static device of the CPU.
        let (device, plain) = unsafe {
            let device = sys::ggml_backend_dev_by_type(sys::GGML_BACKEND_DEVICE_TYPE_CPU);
            (device, sys::ggml_backend_dev_buffer_type(device))
        };
        let layout = extra_buffer_types(device).into_iter().find(|kind| supports(device, *kind, w, y));
        weights.allocate(layout.unwrap_or(plain))?;
        values.allocate(plain)?;
        for (w, _) in &pairs {
            // SAFETY: the tensor has memory for exactly these blocks, which the library may rearrange.
            unsafe { sys::ggml_backend_tensor_set(w.as_ptr(), bytes.as_ptr().cast(), 0, bytes.len()) };
        }
        // SAFETY: `x` has `tokens * cols` floats, as its tensor.
        unsafe { sys::ggml_backend_tensor_set(x_tensor.as_ptr(), x.as_ptr().cast(), 0, size_of_val(x)) };
        // SAFETY: no arguments; the backend is ours from here on.
        let backend = not_null(unsafe { sys::ggml_backend_cpu_init() }, "start its CPU backend")?;
        // SAFETY: a CPU backend, just made.
        unsafe { sys::ggml_backend_cpu_set_n_threads(backend.as_ptr(), threads as i32) };
        Ok(Self {
            graph,
            backend,
            y,
            repacked: layout.is_some(),
            bytes: bytes.len(),
            _weights: weights,
            _values: values,
        })
    }

    /// Computes every product once.
    pub fn run(&mut self) {
        // SAFETY: graph, tensors and their memory live as long as `self`.
        let status = unsafe { sys::ggml_backend_graph_compute(self.backend.as_ptr(), self.graph.as_ptr()) };
        assert_eq!(status, sys::GGML_STATUS_SUCCESS, "a graph of products cannot fail");
    }

    /// Whether the weights lie in a layout of the library's own, as in llama.cpp.
    #[must_use]
    pub fn repacked(&self) -> bool {
        self.repacked
    }

    /// Bytes of one weight.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first product's result, row after row of tokens.
    #[must_use]
    pub fn output(&self) -> Vec<f32> {
        // SAFETY: the tensor is alive and lies in memory that the host can read.
        unsafe {
            let mut out = vec![0.0f32; sys::ggml_nelements(self.y.as_ptr()) as usize];
            sys::ggml_backend_tensor_get(self.y.as_ptr(), out.as_mut_ptr().cast(), 0, size_of_val(&out[..]));
            out
        }
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        // SAFETY: ours, freed once; the arenas, which it does not own, follow.
        unsafe { sys::ggml_backend_free(self.backend.as_ptr()) };
    }
}

/// Kinds of memory in which `device` keeps weights in layouts of its own, best first.
fn extra_buffer_types(device: sys::ggml_backend_dev_t) -> Vec<sys::ggml_backend_buffer_type_t> {
    type Get = unsafe extern "C" fn(sys::ggml_backend_dev_t) -> *mut sys::ggml_backend_buffer_type_t;
    // SAFETY: the name is that of a function of type `Get` (ggml-backend.h), or there is none.
    let get: Option<Get> = unsafe {
        let registry = sys::ggml_backend_dev_backend_reg(device);
        let address = sys::ggml_backend_reg_get_proc_address(registry, c"ggml_backend_dev_get_extra_bufts".as_ptr());
        std::mem::transmute::<*mut c_void, Option<Get>>(address)
    };
    let Some(get) = get else { return Vec::new() };
    let mut kinds = Vec::new();
    // SAFETY: a static array that ends with a null pointer, or null.
    unsafe {
        let mut at = get(device);
        while !at.is_null() && !(*at).is_null() {
            kinds.push(*at);
            at = at.add(1);
        }
    }
    kinds
}

/// Whether `device` computes the product `y` with its weight `w` in memory of `kind`; asked as llama.cpp's loader does,
/// with an empty buffer in the weight's place.
fn supports(
    device: sys::ggml_backend_dev_t,
    kind: sys::ggml_backend_buffer_type_t,
    w: NonNull<sys::ggml_tensor>,
    y: NonNull<sys::ggml_tensor>,
) -> bool {
    // SAFETY: the tensors are alive and have no memory yet; the buffer is taken away again before it is freed.
    unsafe {
        let buffer = sys::ggml_backend_buft_alloc_buffer(kind, 0);
        (*w.as_ptr()).buffer = buffer;
        let supported = sys::ggml_backend_dev_supports_op(device, y.as_ptr());
        (*w.as_ptr()).buffer = null_mut();
        sys::ggml_backend_buffer_free(buffer);
        supported
    }
}

/// A GGUF model in llama.cpp.
pub struct Llama {
    model: NonNull<sys::llama_model>,
    context: NonNull<sys::llama_context>,
    vocab: u32,
}

impl Llama {
    /// Loads the file at `path` for texts of up to `tokens` tokens on `threads` threads, with llama.cpp's defaults.
    ///
    /// # Errors
    /// llama.cpp refuses the file.
    pub fn open(path: &Path, tokens: usize, threads: usize) -> Result<Self> {
        start();
        let name = c_path(path)?;
        let refused = |e: Error| e.at(format!("`{}`", path.display()));
        // SAFETY: the path ends with a zero and lives for the call; the parameters are the library's defaults.
        let model = unsafe { sys::llama_model_load_from_file(name.as_ptr(), sys::llama_model_default_params()) };
        let model = not_null(model, "load the model").map_err(refused)?;
        // SAFETY: no arguments.
        let mut params = unsafe { sys::llama_context_default_params() };
        (params.n_ctx, params.n_threads, params.n_threads_batch) = (tokens as u32, threads as i32, threads as i32);
        params.n_batch = tokens as u32;
        params.no_perf = true;
        // SAFETY: the model is alive; the context is freed before it.
        let context = unsafe { sys::llama_init_from_model(model.as_ptr(), params) };
        let Ok(context) = not_null(context, "make a context") else {
            // SAFETY: ours, and nothing refers to it.
            unsafe { sys::llama_model_free(model.as_ptr()) };
            return Err(refused(failed("make a context")));
        };
        // SAFETY: the model is alive.
        let vocab = unsafe { sys::llama_vocab_n_tokens(sys::llama_model_get_vocab(model.as_ptr())) };
        Ok(Self { model, context, vocab: u32::try_from(vocab).unwrap_or(0).max(1) })
    }

    /// Forgets the text.
    pub fn clear(&mut self) {
        // SAFETY: the context is alive.
        unsafe { sys::llama_memory_clear(sys::llama_get_memory(self.context.as_ptr()), false) };
    }

    /// Runs `ids` after the text so far, up to the logits of the last. Ids beyond the vocabulary are wrapped into it.
    ///
    /// # Errors
    /// The context is full, or llama.cpp fails otherwise.
    pub fn advance(&mut self, ids: &[u32]) -> Result<()> {
        let mut tokens: Vec<sys::llama_token> = ids.iter().map(|id| (id % self.vocab).cast_signed()).collect();
        // SAFETY: the batch borrows `tokens`, which live until the work on it is waited for.
        let status = unsafe {
            let batch = sys::llama_batch_get_one(tokens.as_mut_ptr(), tokens.len() as i32);
            let status = sys::llama_decode(self.context.as_ptr(), batch);
            sys::llama_synchronize(self.context.as_ptr());
            status
        };
        if status == 0 { Ok(()) } else { Err(failed("run tokens")) }
    }

    /// What it says of the model: size and type.
    #[must_use]
    pub fn description(&self) -> String {
        let mut text = [0u8; 128];
        // SAFETY: the buffer has the length that is told; the result ends with a zero within it.
        unsafe { sys::llama_model_desc(self.model.as_ptr(), text.as_mut_ptr().cast(), text.len()) };
        CStr::from_bytes_until_nul(&text).map_or_else(|_| String::new(), |t| t.to_string_lossy().into_owned())
    }

    /// Bytes of its tensors.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        // SAFETY: the model is alive.
        unsafe { sys::llama_model_size(self.model.as_ptr()) }
    }
}

impl Drop for Llama {
    fn drop(&mut self) {
        // SAFETY: both are ours; the context goes before the model that it refers to.
        unsafe {
            sys::llama_free(self.context.as_ptr());
            sys::llama_model_free(self.model.as_ptr());
        }
    }
}

/// Makes a GGUF file of type `quant` from another, which may be quantized already.
///
/// # Errors
/// llama.cpp cannot read one or write the other.
pub fn requantize(from: &Path, to: &Path, quant: Quant) -> Result<()> {
    start();
    let (source, out) = (c_path(from)?, c_path(to)?);
    // SAFETY: no arguments.
    let mut params = unsafe { sys::llama_model_quantize_default_params() };
    (params.ftype, params.allow_requantize) = (quant.file_type(), true);
    // SAFETY: both paths end with a zero, all three live for the call.
    match unsafe { sys::llama_model_quantize(source.as_ptr(), out.as_ptr(), &raw const params) } {
        0 => Ok(()),
        _ => Err(failed(&format!("make `{}` from it", quant.name())).at(format!("`{}`", from.display()))),
    }
}

fn c_path(path: &Path) -> Result<CString> {
    let bytes = path.as_os_str().as_encoded_bytes();
    CString::new(bytes).map_err(|e| Error::config("path", "no zero byte", path.display()).caused_by(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_those_of_the_dequantized_weights() {
        for quant in Quant::ALL {
            let (rows, cols, tokens) = (96, 512, 3);
            let mut rng = crate::rng::Rng::new(1);
            let weights: Vec<f32> = (0..rows * cols).map(|_| rng.unit() - 0.5).collect();
            let x: Vec<f32> = (0..tokens * cols).map(|_| rng.unit() - 0.5).collect();
            let bytes = quantize(quant, &weights, cols).unwrap();
            let exact = dequantize(quant.id(), &bytes, weights.len()).unwrap();
            let mut products = Products::with(quant, (rows, cols), &bytes, 4, &x, 2).unwrap();
            products.run();
            let y = products.output();
            assert_eq!(y.len(), rows * tokens);
            // Activations are rounded to 8 bits: errors of half a percent of the terms' norm.
            let bound = 0.01 * (cols as f64).sqrt() * 0.3 * 0.3 * 4.0;
            for (i, y) in y.iter().enumerate() {
                let (t, o) = (i / rows, i % rows);
                let terms = x[t * cols..][..cols].iter().zip(&exact[o * cols..][..cols]);
                let expected: f64 = terms.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                let error = (f64::from(*y) - expected).abs();
                assert!(error < bound, "{quant:?} token {t} row {o}: {y}, expected {expected}, bound {bound}");
            }
        }
        assert!(Products::new(Quant::Q4K, (8, 576), 1, 1, 1).unwrap().is_none(), "576 is no multiple of 256");
    }

    #[test]
    fn a_file_that_is_no_model_is_an_error_with_a_reason() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"no gguf").unwrap();
        let error = Llama::open(file.path(), 8, 1).err().unwrap();
        assert!(error.to_string().contains("load the model"), "{error}");
    }
}
