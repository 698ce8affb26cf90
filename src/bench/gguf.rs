//! A model of random weights as a GGUF file in f16, so that llama.cpp can run and quantize what we run.
//!
//! Version 3 of the format, with what llama.cpp needs of its keys. Rows are not reordered for its rotary embedding: one
//! noise is as good as another.

use super::shape::{Synthetic, config};
use super::{OnMeasure, check};
use crate::error::{Error, Result};
use crate::format::{Source, write_file};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Data of each tensor begins at a multiple of this.
const ALIGN: u64 = 32;
/// Elements converted at once.
const PIECE: usize = 1 << 20;

/// GGUF's numbers of value types, and ggml's of element types.
const U32: u32 = 4;
const F32: u32 = 6;
const STRING: u32 = 8;
const TENSOR_F32: u32 = 0;
const TENSOR_F16: u32 = 1;

/// Writes the shape `name` into `folder`, unless it is there, and returns the file's path.
///
/// # Errors
/// An unknown name, the disk refuses, stopped.
pub fn write_shape(name: &str, folder: &Path, progress: &mut OnMeasure<'_>) -> Result<PathBuf> {
    let source = Synthetic::new(config(name)?)?;
    let path = folder.join(format!("{name}.f16.gguf"));
    if !path.exists() {
        check(progress, &format!("{name} as GGUF"))?;
        write_file(&path, |file| write(&source, name, file, &path))?;
    }
    Ok(path)
}

fn write(source: &Synthetic, name: &str, file: &mut File, path: &Path) -> Result<()> {
    let mut out = BufWriter::new(file);
    let refused = |e| Error::io("write", path, e);
    let header = header(source, name);
    out.write_all(&header).map_err(refused)?;
    let mut at = header.len() as u64;
    for (index, tensor) in source.tensors().iter().enumerate() {
        out.write_all(&vec![0; (at.next_multiple_of(ALIGN) - at) as usize]).map_err(refused)?;
        at = at.next_multiple_of(ALIGN);
        let (rows, width) = match tensor.shape[..] {
            [rows, width] => (rows, width),
            _ => (tensor.shape[0], 1),
        };
        let step = (PIECE / width).max(1);
        for first in (0..rows).step_by(step) {
            let rows = first..(first + step).min(rows);
            let mut values = vec![0.0; rows.len() * width];
            source.read_rows(index, rows, &mut values)?;
            let bytes: Vec<u8> = if tensor.shape.len() == 1 {
                values.iter().flat_map(|x| x.to_le_bytes()).collect()
            } else {
                let mut narrow = vec![f16::ZERO; values.len()];
                narrow.convert_from_f32_slice(&values);
                narrow.iter().flat_map(|x| x.to_le_bytes()).collect()
            };
            out.write_all(&bytes).map_err(refused)?;
            at += bytes.len() as u64;
        }
    }
    out.flush().map_err(refused)
}

/// Everything before the data, up to where the first tensor's begins.
fn header(source: &Synthetic, name: &str) -> Vec<u8> {
    let json = source.config();
    let family = json.get("model_type").and_then(|v| v.as_str()).unwrap_or_default().to_owned();
    let number = |key: &str| json.get(key).and_then(serde_json::Value::as_u64).unwrap_or(0) as u32;
    let real = |key: &str| json.get(key).and_then(serde_json::Value::as_f64).unwrap_or(0.0) as f32;
    let of = |key: &str| format!("{family}.{key}");
    let mut keys = Keys { bytes: Vec::new(), count: 0 };
    keys.text("general.architecture", &family);
    keys.text("general.name", name);
    keys.text("tokenizer.ggml.model", "no_vocab");
    for (key, value) in [
        (of("block_count"), number("num_hidden_layers")),
        (of("context_length"), number("max_position_embeddings")),
        (of("embedding_length"), number("hidden_size")),
        (of("feed_forward_length"), number("intermediate_size")),
        (of("attention.head_count"), number("num_attention_heads")),
        (of("attention.head_count_kv"), number("num_key_value_heads")),
        (of("vocab_size"), number("vocab_size")),
    ] {
        keys.pair(&key, U32, &value.to_le_bytes());
    }
    keys.pair(&of("attention.layer_norm_rms_epsilon"), F32, &real("rms_norm_eps").to_le_bytes());
    keys.pair(&of("rope.freq_base"), F32, &real("rope_theta").to_le_bytes());

    let tensors = source.tensors();
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend(keys.count.to_le_bytes());
    out.extend(keys.bytes);
    let mut offset = 0u64;
    for tensor in tensors {
        let vector = tensor.shape.len() == 1;
        out.extend(string(&ggml_name(&tensor.name)));
        out.extend((tensor.shape.len() as u32).to_le_bytes());
        // ggml counts dimensions from the innermost.
        tensor.shape.iter().rev().for_each(|&d| out.extend((d as u64).to_le_bytes()));
        out.extend(if vector { TENSOR_F32 } else { TENSOR_F16 }.to_le_bytes());
        out.extend(offset.to_le_bytes());
        let elements: usize = tensor.shape.iter().product();
        offset = (offset + elements as u64 * if vector { 4 } else { 2 }).next_multiple_of(ALIGN);
    }
    out.resize(out.len().next_multiple_of(ALIGN as usize), 0);
    out
}

/// Keys with their values.
struct Keys {
    bytes: Vec<u8>,
    count: u64,
}

impl Keys {
    fn pair(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.bytes.extend(string(key));
        self.bytes.extend(kind.to_le_bytes());
        self.bytes.extend(value);
        self.count += 1;
    }

    fn text(&mut self, key: &str, value: &str) {
        self.pair(key, STRING, &string(value));
    }
}

/// A length and the bytes.
fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

/// llama.cpp's name of a weight.
fn ggml_name(name: &str) -> String {
    const PARTS: [(&str, &str); 11] = [
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    let name = name.replace("model.layers.", "blk.");
    PARTS.iter().find(|(part, _)| name.contains(part)).map_or(name.clone(), |(part, new)| name.replace(part, new))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::ggml::{Llama, Quant, requantize};
    use crate::format::gguf::Gguf;

    #[test]
    fn we_and_llama_cpp_read_the_file_and_its_quantized_copies() {
        let mut tiny = config("qwen2.5-0.5b").unwrap();
        for (key, size) in
            [("hidden_size", 256), ("num_hidden_layers", 2), ("intermediate_size", 512), ("vocab_size", 300)]
        {
            tiny.insert(key.to_owned(), size.into());
        }
        tiny.insert("num_attention_heads".to_owned(), 4.into());
        let source = Synthetic::new(tiny).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tiny.gguf");
        write_file(&path, |file| write(&source, "tiny", file, &path)).unwrap();
        let ours = Gguf::open(&path).unwrap();
        // The first and the last tensor by place: the embedding, and a matrix behind all the others.
        for name in ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"] {
            let find = |s: &dyn Source| s.tensors().iter().position(|t| t.name == name).unwrap();
            let width = source.tensors()[find(&source)].shape[1];
            let (mut read, mut expected) = (vec![0.0; width], vec![0.0; width]);
            ours.read_rows(find(&ours), 7..8, &mut read).unwrap();
            source.read_rows(find(&source), 7..8, &mut expected).unwrap();
            assert!(read.iter().zip(&expected).all(|(a, b)| *a == f16::from_f32(*b).to_f32()), "{name}");
        }
        for quant in Quant::ALL {
            let out = folder.path().join(quant.name());
            requantize(&path, &out, quant).unwrap();
            let mut llama = Llama::open(&out, 16, 1).unwrap();
            llama.advance(&[1, 2, 299]).unwrap();
            assert!(llama.description().contains("qwen2"), "{}", llama.description());
        }
    }
}
