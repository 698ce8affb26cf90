//! The inner loops of the light ops, each written once beside its op and compiled once for each set of vector
//! instructions: the compiler vectorizes them, and one that knows of AVX-512 makes twice and more of it than one that
//! may count on SSE2 only. What is added here is nothing but those compilations and the way to them.

use super::adamw::Factors;
use super::adamw8::Blocks;
use super::cache::BLOCK as KEYS;
use super::delta_rule::{Gradients, Token};
use crate::Map;

/// Makes the table of loops, a safe method for each, and its instances.
macro_rules! light {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $text:expr;)*) => {
        /// The loops compiled for one instruction set. They check the lengths of their slices themselves.
        pub(crate) struct Light {
            $($name: unsafe fn($($type),*) $(-> $out)?,)*
        }

        impl Light {
            $(
                $(#[$doc])*
                pub fn $name(&self, $($arg: $type),*) $(-> $out)? {
                    // SAFETY: the code is safe but for the instructions it uses, and the instances are named in the
                    // ISA tables alone, of which `Table::available()` hands out only those that this CPU runs.
                    #[allow(unsafe_code, reason = "entry wrapper of the ISA table")]
                    unsafe { (self.$name)($($arg),*) }
                }
            )*
        }

        /// For what the compilation target guarantees.
        pub(super) mod portable {
            light!(@texts cfg!(target_arch = "aarch64"), inline, $(fn $name($($arg: $type),*) $(-> $out)? = $text;)*);
        }

        #[cfg(target_arch = "x86_64")]
        pub(super) mod avx2 {
            light!(@texts true, target_feature(enable = "avx2,fma"),
                $(fn $name($($arg: $type),*) $(-> $out)? = $text;)*);
        }

        #[cfg(target_arch = "x86_64")]
        pub(super) mod avx512 {
            light!(@texts true, target_feature(enable = "avx512f,avx512bw,avx512vl,avx2,fma"),
                $(fn $name($($arg: $type),*) $(-> $out)? = $text;)*);
        }
    };
    (@texts $fma:expr, $attribute:meta, $(fn $name:ident($($arg:ident: $type:ty),*) $(-> $out:ty)? = $text:expr;)*) => {
        use super::super::{adamw, adamw8, cache, conv, delta_rule, gated, layer_norm, map, rms_norm, rope, sgd, softmax, state_space};
        use super::{Blocks, Factors, Gradients, KEYS, Light, Map, Token};

        /// Whether products and sums may be rounded once.
        const FMA: bool = $fma;

        pub(crate) static LIGHT: Light = Light { $($name,)* };

        $(
            #[$attribute]
            fn $name($($arg: $type),*) $(-> $out)? {
                $text($($arg),*)
            }
        )*
    };
}

light! {
    /// Rows of `y` from rows of `x`, both of `width`, with factors `w` of one or several.
    fn rms_norm(w: &[f32], width: usize, eps: f32, x: &[f32], y: &mut [f32]) = rms_norm::rows;
    /// Adds the gradient of such rows to `dx`.
    fn rms_norm_vjp(w: &[f32], width: usize, eps: f32, x: &[f32], dy: &[f32], dx: &mut [f32]) = rms_norm::vjp_rows;
    /// Rows of `y` from rows of `x`, as long as the factors and terms `wb`.
    fn layer_norm(wb: [&[f32]; 2], eps: f32, x: &[f32], y: &mut [f32]) = layer_norm::rows;
    /// Adds the gradient of such rows to `dx`.
    fn layer_norm_vjp(w: &[f32], eps: f32, x: &[f32], dy: &[f32], dx: &mut [f32]) = layer_norm::vjp_rows;
    /// Turns the heads of one token, back if `sign` is -1.
    fn rope(head_dim: usize, sign: f32, cos: &[f32], sin: &[f32], x: &[f32], y: &mut [f32]) = rope::token;
    /// The same of pairs of neighbours.
    fn rope_pairs(head_dim: usize, sign: f32, cos: &[f32], sin: &[f32], x: &[f32], y: &mut [f32]) = rope::token_pairs;
    /// `y = silu(gate) up`.
    fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32]) = gated::value::<FMA, false>;
    /// Its gradients by `gate` and by `up`.
    fn swiglu_vjp(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) = gated::slope::<FMA, false>;
    /// The same gradients in the place of `gate` and `up`.
    fn swiglu_vjp_in_place(dy: &[f32], gate: &mut [f32], up: &mut [f32]) = gated::slope_in_place::<FMA, false>;
    /// `y = gelu(gate) up`.
    fn geglu(gate: &[f32], up: &[f32], y: &mut [f32]) = gated::value::<FMA, true>;
    /// Its gradients by `gate` and by `up`.
    fn geglu_vjp(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) = gated::slope::<FMA, true>;
    /// The same gradients in the place of `gate` and `up`.
    fn geglu_vjp_in_place(dy: &[f32], gate: &mut [f32], up: &mut [f32]) = gated::slope_in_place::<FMA, true>;
    /// Largest element, `-inf` of an empty row. A NaN may be skipped: [`Light::exp_sum`] carries it.
    fn largest(x: &[f32]) -> f32 = softmax::largest;
    /// `x = e^(x - shift)`; returns the sum.
    fn exp_sum(x: &mut [f32], shift: f32) -> f64 = softmax::exp_sum::<FMA>;
    /// See [`softmax::steps`].
    fn softmax_steps(x: &mut [[f32; KEYS]], max: &mut [f32], sums: &mut [f32]) = softmax::steps::<FMA>;
    /// See [`softmax::vjp`].
    fn softmax_vjp(scale: f32, lse: f32, along: f32, s: &mut [f32; KEYS], dp: &mut [f32; KEYS]) = softmax::vjp::<FMA>;
    /// See [`softmax::vjp_capped`].
    fn softmax_vjp_capped(factors: [f32; 2], lse: f32, along: f32, s: &mut [f32; KEYS], dp: &mut [f32; KEYS])
        = softmax::vjp_capped::<FMA>;
    /// See [`map::softcap`].
    fn softcap(cap: f32, x: &mut [f32]) = map::softcap::<FMA>;
    /// `sum_i a[i] b[i]`.
    fn dot(a: &[f32], b: &[f32]) -> f32 = softmax::dot;
    /// See [`adamw::step`].
    fn adamw(f: &Factors, grad: &[f32], param: &mut [f32], m: &mut [f32], v: &mut [f32]) = adamw::elements;
    /// See [`adamw8::step`].
    fn adamw8(f: &Factors, grad: &[f32], param: &mut [f32], m: Blocks, v: Blocks) = adamw8::blocks;
    /// See [`sgd::sgd`].
    fn sgd(keep: f32, lr: f32, grad: &[f32], param: &mut [f32]) = sgd::plain;
    /// See [`sgd::sgd`].
    fn sgd_momentum(keep: f32, lr: f32, momentum: f32, grad: &[f32], param: &mut [f32], m: &mut [f32])
        = sgd::with_momentum;
    /// See [`sgd::lion`].
    fn lion(keep: f32, lr: f32, betas: [(f32, f32); 2], grad: &[f32], param: &mut [f32], m: &mut [f32]) = sgd::by_sign;
    /// See [`cache::encode_int8`].
    fn encode_int8(x: &[f32], codes: &mut [u8]) -> f32 = cache::encode_int8;
    /// Products of codes with the scale of their column: rows as long as `scales`.
    fn decode_int8_keys(codes: &[u8], scales: &[f32], out: &mut [f32]) = cache::decode_int8_keys;
    /// Products of codes with the scale of their row: as many rows as `scales`.
    fn decode_int8_values(codes: &[u8], scales: &[f32], out: &mut [f32]) = cache::decode_int8_values;
    /// See [`map::forward`].
    fn map(kind: Map, x: &[f32], y: &mut [f32]) = map::values::<FMA>;
    /// See [`map::vjp`].
    fn map_vjp(kind: Map, x: &[f32], dy: &[f32], dx: &mut [f32]) = map::slopes::<FMA>;
    /// See [`conv::row`].
    fn conv(w: &[f32], xs: &[&[f32]], y: &mut [f32]) = conv::row::<FMA>;
    /// See [`delta_rule::step`].
    fn delta_step(token: Token, s: &mut [f32], r: &mut [f32], y: &mut [f32]) = delta_rule::step::<FMA>;
    /// See [`delta_rule::back`].
    fn delta_back(token: Token, states: [&[f32]; 2], r: &[f32], dy: &[f32], ds: &mut [f32], out: Gradients) -> [f32; 2]
        = delta_rule::back::<FMA>;
    /// See [`state_space::add_rows`].
    fn add_rows(a: &[f32], a_step: usize, x: &[f32], x_step: usize, rows: usize, y: &mut [f32])
        = state_space::add_rows::<FMA>;
    /// See [`state_space::pairs`].
    fn state_pairs(g: &[f64], d: &[f32], cb: &[f32], weights: &mut [f32]) = state_space::pairs::<FMA>;
    /// See [`state_space::pairs_vjp`].
    fn state_pairs_vjp(g: &[f64], d: &[f32], cb: &mut [f32], e: &mut [f32], dg: &mut [f64]) -> f64
        = state_space::pairs_vjp::<FMA>;
    /// See [`state_space::step`].
    fn state_step(decay: f32, d: f32, token: [&[f32]; 3], s: &mut [f32], y: &mut [f32]) = state_space::step::<FMA>;
}
