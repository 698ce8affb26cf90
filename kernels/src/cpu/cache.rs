//! Keys and values of one layer, in tiles that attention multiplies by without rearranging them.
//!
//! Tokens come in blocks of [`BLOCK`]. A block holds for each head a tile of keys `[D, BLOCK]`, turned so that the scores
//! of neighbouring keys are neighbours in a vector, and behind it a tile of values `[BLOCK, D]`. A thread reads both of
//! its head as one stream, and a token appended costs `D` scattered stores a head.
//!
//! A cache with a window drops the blocks that no later query sees, and moves the others to the front of its memory: a
//! window's bytes moved once for every [`BLOCK`] tokens, so that blocks always follow each other.

use super::buffer::{LINE, reserve};
use super::light::Light;
use super::loops::{reduce, sum, update};
use super::table::Table;
use crate::quant::nearest_f32;
use crate::{CacheType, Error, FloatType};
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// Tokens of a block: with 64-wide heads in f16, its two tiles are 16 KiB.
pub(crate) const BLOCK: usize = 64;

/// Keys and values, appended token by token.
pub struct Cache {
    kv_heads: usize,
    head_dim: usize,
    dtype: CacheType,
    /// Tokens appended, those that were dropped included.
    len: usize,
    /// How many of the last tokens a query sees, its own included; `None` if all.
    window: Option<usize>,
    /// Blocks dropped.
    dropped: usize,
    /// Blocks, then in them heads, then keys before values, from `aligned` on, where a cache line begins; elements as
    /// [`CacheType`] says, little-endian. What lies behind the last token holds anything finite or not.
    bytes: Vec<u8>,
    aligned: usize,
    /// In 8 bits one a row and head, in the same order; else none.
    scales: Vec<f32>,
}

/// What a [`Cache`] holds, see [`Cache::image`].
#[derive(Clone, Copy, Debug)]
pub struct Image<'a> {
    /// Tokens appended, those that were dropped included.
    pub len: usize,
    /// Blocks dropped.
    pub dropped: usize,
    /// The blocks held.
    pub blocks: &'a [u8],
    /// Their scales, in 8 bits.
    pub scales: &'a [f32],
}

/// `count` rows of `width` elements, `stride` apart.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    pub dtype: CacheType,
    pub bytes: &'a [u8],
    pub stride: usize,
    pub width: usize,
    pub count: usize,
    /// Bytes from here to the tile that the same head reads next, if there is one.
    pub next: usize,
}

impl Tile<'_> {
    /// Whether who multiplies by the columns from `n` on, for rows of outputs from `i` on, should [`Tile::ask`]: the first
    /// reader of each line does.
    #[inline(always)]
    pub fn asks(self, i: usize, n: usize) -> bool {
        i == 0 && (n * size(self.dtype)).is_multiple_of(LINE)
    }

    /// Calls `prefetch` for the counterparts in the next tile of the `len` bytes at `at`: of short streams that jump,
    /// processors foresee too little.
    #[inline(always)]
    pub fn ask(self, at: *const u8, len: usize, prefetch: impl Fn(*const u8)) {
        for line in (0..len).step_by(LINE) {
            prefetch(at.wrapping_add(self.next + line));
        }
    }
}

/// What a tile holds.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Keys,
    Values,
}

/// Bytes of an element.
pub(crate) fn size(dtype: CacheType) -> usize {
    match dtype {
        CacheType::F32 => 4,
        CacheType::F16 => 2,
        CacheType::I8 => 1,
    }
}

/// Bytes of a token's keys and values, with their scales.
fn token_bytes(kv_heads: usize, head_dim: usize, dtype: CacheType) -> usize {
    let scale = if dtype == CacheType::I8 { size_of::<f32>() } else { 0 };
    2 * kv_heads * (head_dim * size(dtype) + scale)
}

/// Blocks in which a window may lie.
fn most_blocks(window: usize) -> usize {
    window.div_ceil(BLOCK) + 1
}

impl Cache {
    /// Holds all tokens or, with a window, those that the next query can see and less than a block more.
    pub(crate) fn new(kv_heads: usize, head_dim: usize, dtype: CacheType, window: Option<usize>) -> Self {
        assert!(window != Some(0), "a query sees itself");
        let (bytes, scales) = (Vec::new(), Vec::new());
        Self { kv_heads, head_dim, dtype, len: 0, window, dropped: 0, bytes, aligned: 0, scales }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of the keys and values held, with their scales.
    #[must_use]
    pub fn bytes(&self) -> usize {
        (self.len - self.dropped * BLOCK) * token_bytes(self.kv_heads, self.head_dim, self.dtype)
    }

    /// Bytes that a cache of these sizes holds at most, once `tokens` tokens were appended one by one: with a window, those
    /// of the blocks in which it may lie.
    #[must_use]
    pub fn most_bytes(
        kv_heads: usize,
        head_dim: usize,
        dtype: CacheType,
        window: Option<usize>,
        tokens: usize,
    ) -> usize {
        let most = window.map_or(usize::MAX, |window| most_blocks(window).saturating_mul(BLOCK));
        tokens.min(most).saturating_mul(token_bytes(kv_heads, head_dim, dtype))
    }

    /// Bytes of the memory that it takes.
    #[cfg(test)]
    pub(crate) fn capacity(&self) -> usize {
        self.bytes.capacity() + size_of::<f32>() * self.scales.capacity()
    }

    /// Elements of a token's keys.
    pub(crate) fn width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Bytes of a tile.
    fn tile_bytes(&self) -> usize {
        BLOCK * self.head_dim * size(self.dtype)
    }

    /// Number of a tile among those held.
    fn tile(&self, block: usize, head: usize, side: Side) -> usize {
        assert!(head < self.kv_heads && block >= self.dropped);
        ((block - self.dropped) * self.kv_heads + head) * 2 + usize::from(side == Side::Values)
    }

    /// First token that the query at position `at` sees.
    fn oldest(&self, at: usize) -> usize {
        self.window.map_or(0, |window| (at + 1).saturating_sub(window))
    }

    /// Appends some rows of `k` and `v`.
    pub(crate) fn append(&mut self, light: &Light, k: &[f32], v: &[f32], rows: Range<usize>) -> Result<(), Error> {
        let width = self.width().max(1);
        assert!(k.len() == v.len() && k.len().is_multiple_of(width));
        let (tokens, rows) = (rows.len(), rows.start * width..rows.end * width);
        let (k, v) = (&k[rows.clone()], &v[rows]);
        self.drop_unseen();
        self.make_room((self.len + tokens).div_ceil(BLOCK) - self.dropped)?;
        let mut row = reserve(self.head_dim * size(self.dtype))?;
        row.resize(self.head_dim * size(self.dtype), 0);
        for (side, x) in [(Side::Keys, k), (Side::Values, v)] {
            for (t, x) in x.chunks_exact(width).enumerate() {
                for (head, x) in x.chunks_exact(self.head_dim).enumerate() {
                    let scale = encode(light, self.dtype, x, &mut row);
                    self.put(self.len + t, head, side, &row, scale);
                }
            }
        }
        self.len += tokens;
        Ok(())
    }

    /// Drops the blocks that the next token does not see.
    fn drop_unseen(&mut self) {
        let first = self.oldest(self.len) / BLOCK;
        let tiles = (first - self.dropped.min(first)) * self.kv_heads * 2;
        if tiles > 0 {
            self.bytes.drain(self.aligned..self.aligned + tiles * self.tile_bytes());
            if self.dtype == CacheType::I8 {
                self.scales.drain(..tiles * BLOCK);
            }
            self.dropped = first;
        }
    }

    /// Makes the memory at least `blocks` long. Nothing has changed after an error.
    fn make_room(&mut self, blocks: usize) -> Result<(), Error> {
        let tiles = |blocks: usize| blocks.saturating_mul(self.kv_heads * 2);
        let size = |blocks: usize| tiles(blocks).saturating_mul(self.tile_bytes());
        let scales = |blocks: usize| if self.dtype == CacheType::I8 { tiles(blocks).saturating_mul(BLOCK) } else { 0 };
        // Half as much again, not the double of `Vec`: this memory is the session's largest after weights. A window needs
        // no more than itself and a block, as long as tokens come one by one.
        let held = self.bytes.len().saturating_sub(self.aligned) / size(1).max(1);
        let most = self.window.map_or(usize::MAX, most_blocks);
        let ample = blocks.max(most.min(held + held / 2));
        // What a long prompt took goes back when its tokens are dropped.
        let spare = blocks <= most && self.bytes.capacity() / 3 * 2 > size(most).saturating_add(LINE);
        if !spare && self.bytes.len() >= self.aligned + size(blocks) {
            return Ok(());
        }
        let (bytes, scales, ample) = (size(blocks), scales(blocks), [size(ample), scales(ample)]);
        if spare || self.scales.capacity() < scales {
            let mut grown = reserve(ample[1]).or_else(|_| reserve(scales))?;
            let kept = self.scales.len().min(scales);
            grown.extend_from_slice(&self.scales[..kept]);
            self.scales = grown;
        }
        if spare || self.bytes.capacity() < self.aligned + bytes {
            let mut grown: Vec<u8> = reserve(ample[0].saturating_add(LINE)).or_else(|_| reserve(bytes + LINE))?;
            let aligned = grown.as_ptr().align_offset(LINE).min(LINE);
            grown.resize(aligned, 0);
            let kept = self.bytes.len().min(self.aligned + bytes);
            grown.extend_from_slice(&self.bytes[self.aligned..kept]);
            (self.bytes, self.aligned) = (grown, aligned);
        }
        self.bytes.resize(self.aligned + bytes, 0);
        self.scales.resize(scales, 0.0);
        Ok(())
    }

    /// Writes the encoded row of one token and head into its tile.
    fn put(&mut self, token: usize, head: usize, side: Side, row: &[u8], scale: Option<f32>) {
        let (tile, slot) = (self.tile(token / BLOCK, head, side), token % BLOCK);
        let at = self.aligned + tile * self.tile_bytes();
        let bytes = &mut self.bytes[at..][..BLOCK * row.len()];
        match (side, self.dtype) {
            (Side::Values, _) => bytes[slot * row.len()..][..row.len()].copy_from_slice(row),
            (Side::Keys, CacheType::F32) => scatter::<4>(row, slot, bytes),
            (Side::Keys, CacheType::F16) => scatter::<2>(row, slot, bytes),
            (Side::Keys, CacheType::I8) => scatter::<1>(row, slot, bytes),
        }
        if let Some(scale) = scale {
            self.scales[tile * BLOCK + slot] = scale;
        }
    }

    /// What it holds as it lies in memory, for a file: the tokens appended, the blocks dropped, the blocks held, and their
    /// scales where they are in 8 bits. [`Cache::restore`] takes it back. What forgotten tokens left is cleared first.
    #[must_use]
    pub fn image(&mut self) -> Image<'_> {
        self.clear_rest();
        let tiles = (self.len.div_ceil(BLOCK) - self.dropped) * self.kv_heads * 2;
        let scales = if self.dtype == CacheType::I8 { tiles * BLOCK } else { 0 };
        let blocks = &self.bytes[self.aligned.min(self.bytes.len())..][..tiles * self.tile_bytes()];
        Image { len: self.len, dropped: self.dropped, blocks, scales: &self.scales[..scales] }
    }

    /// Zeros behind the last token, up to the end of its block.
    fn clear_rest(&mut self) {
        let (block, slot, size) = (self.len / BLOCK, self.len % BLOCK, size(self.dtype));
        if slot == 0 {
            return;
        }
        for head in 0..self.kv_heads {
            for side in [Side::Keys, Side::Values] {
                let tile = self.tile(block, head, side);
                let (at, bytes) = (self.aligned + tile * self.tile_bytes(), self.tile_bytes());
                let tile_bytes = &mut self.bytes[at..][..bytes];
                match side {
                    Side::Keys => tile_bytes.chunks_exact_mut(BLOCK * size).for_each(|row| row[slot * size..].fill(0)),
                    Side::Values => tile_bytes[slot * self.head_dim * size..].fill(0),
                }
                if self.dtype == CacheType::I8 {
                    self.scales[tile * BLOCK..][slot..BLOCK].fill(0.0);
                }
            }
        }
    }

    /// Holds what `image` does, which comes from a cache of the same sizes; returns `false`, with nothing held, where it
    /// cannot.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn restore(&mut self, image: &Image<'_>) -> Result<bool, Error> {
        (self.len, self.dropped) = (0, 0);
        let &Image { len, dropped, blocks, scales } = image;
        let held = len.div_ceil(BLOCK).checked_sub(dropped);
        let tiles = held.and_then(|held| held.checked_mul(self.kv_heads * 2));
        let of = |size: usize| tiles.and_then(|tiles| tiles.checked_mul(size));
        let own_scales = if self.dtype == CacheType::I8 { of(BLOCK) } else { Some(0) };
        let fits = of(self.tile_bytes()) == Some(blocks.len()) && own_scales == Some(scales.len());
        // The next query sees nothing that was dropped.
        if !fits || dropped > self.oldest(len) / BLOCK {
            return Ok(false);
        }
        self.make_room(held.unwrap_or(0))?;
        self.bytes[self.aligned..][..blocks.len()].copy_from_slice(blocks);
        self.scales[..scales.len()].copy_from_slice(scales);
        (self.len, self.dropped) = (len, dropped);
        Ok(true)
    }

    /// Keeps the first `len` tokens, or none where the next query would miss keys that were dropped; returns how many.
    pub(crate) fn rewind(&mut self, len: usize) -> usize {
        assert!(len <= self.len);
        let reached = if self.oldest(len) >= self.dropped * BLOCK { len } else { 0 };
        self.len = reached;
        self.dropped = self.dropped.min(reached / BLOCK);
        reached
    }

    /// The first `columns` keys of a block, turned and before their scales; those past the last token are undefined.
    pub(crate) fn keys(&self, block: usize, head: usize, columns: usize) -> Tile<'_> {
        let bytes = self.of_tile(self.tile(block, head, Side::Keys));
        let next = self.tile_bytes();
        Tile { dtype: self.dtype, bytes, stride: BLOCK, width: columns.min(BLOCK), count: self.head_dim, next }
    }

    /// The first `count` values of a block as `[count, D]`, before their scales.
    pub(crate) fn values(&self, block: usize, head: usize, count: usize) -> Tile<'_> {
        let bytes = self.of_tile(self.tile(block, head, Side::Values));
        let next = (2 * self.kv_heads - 1) * self.tile_bytes();
        Tile { dtype: self.dtype, bytes, stride: self.head_dim, width: self.head_dim, count, next }
    }

    fn of_tile(&self, tile: usize) -> &[u8] {
        &self.bytes[self.aligned + tile * self.tile_bytes()..][..self.tile_bytes()]
    }

    /// Factors of a block's keys and of its values, where they are in 8 bits.
    pub(crate) fn scales(&self, block: usize, head: usize) -> Option<[&[f32]; 2]> {
        let first = self.tile(block, head, Side::Keys) * BLOCK;
        (self.dtype == CacheType::I8).then(|| [first, first + BLOCK].map(|at| &self.scales[at..][..BLOCK]))
    }

    /// As [`Cache::keys`] and [`Cache::values`], in f32 and times their scales.
    pub(crate) fn decode(&self, table: &Table, block: usize, head: usize, k: &mut [f32], v: &mut [f32]) {
        let tiles = [(k, self.keys(block, head, BLOCK)), (v, self.values(block, head, BLOCK))];
        if let Some(scales) = self.scales(block, head) {
            let [(k, keys), (v, values)] = tiles;
            table.light().decode_int8_keys(keys.bytes, scales[0], k);
            table.light().decode_int8_values(values.bytes, scales[1], v);
        } else {
            let dtype = if self.dtype == CacheType::F16 { FloatType::F16 } else { FloatType::F32 };
            for (out, tile) in tiles {
                table.dense_decode(dtype, tile.bytes, out.len(), out.len(), out);
            }
        }
    }
}

/// Element `d` goes to row `d`, column `slot` of rows of [`BLOCK`] elements.
fn scatter<const SIZE: usize>(row: &[u8], slot: usize, tile: &mut [u8]) {
    let tile = tile.as_chunks_mut::<SIZE>().0;
    for (element, tile) in row.as_chunks::<SIZE>().0.iter().zip(tile.chunks_exact_mut(BLOCK)) {
        tile[slot] = *element;
    }
}

/// One head's row in the cache's type; returns its scale if it has one.
fn encode(light: &Light, dtype: CacheType, x: &[f32], row: &mut [u8]) -> Option<f32> {
    match dtype {
        CacheType::F32 => row.as_chunks_mut().0.iter_mut().zip(x).for_each(|(b, x)| *b = x.to_le_bytes()),
        CacheType::F16 => {
            let mut halves = [f16::ZERO; 64];
            for (row, x) in row.chunks_mut(2 * halves.len()).zip(x.chunks(halves.len())) {
                halves[..x.len()].convert_from_f32_slice(x);
                row.as_chunks_mut().0.iter_mut().zip(&halves).for_each(|(b, h)| *b = h.to_le_bytes());
            }
        }
        CacheType::I8 => return Some(light.encode_int8(x, row)),
    }
    None
}

/// Rounds a row to 8 bits and returns its scale; one that holds a NaN or an infinity gets a NaN as scale.
#[inline(always)]
pub(super) fn encode_int8(x: &[f32], codes: &mut [u8]) -> f32 {
    assert_eq!(x.len(), codes.len());
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let largest = reduce([x], 0.0, |most, [x]| larger(most, x.abs()), larger);
    let finite = sum([x], |[x]| x * 0.0) == 0.0;
    // Below that size, 127 / largest is infinite or nearly; such a row is as good as zero.
    let inverse = if finite && largest > f32::MIN_POSITIVE * 256.0 { 127.0 / largest } else { 0.0 };
    for (code, x) in codes.iter_mut().zip(x) {
        *code = nearest_f32(x * inverse).cast_unsigned();
    }
    if finite { largest / 127.0 } else { f32::NAN }
}

/// See [`Light::decode_int8_keys`].
#[inline(always)]
pub(super) fn decode_int8_keys(codes: &[u8], scales: &[f32], out: &mut [f32]) {
    assert_eq!(codes.len(), out.len());
    for (codes, out) in codes.chunks_exact(scales.len()).zip(out.chunks_exact_mut(scales.len())) {
        widen(codes, out);
        update(out, [scales], |code, [scale]| code * scale);
    }
}

/// See [`Light::decode_int8_values`].
#[inline(always)]
pub(super) fn decode_int8_values(codes: &[u8], scales: &[f32], out: &mut [f32]) {
    assert_eq!(codes.len(), out.len());
    let width = out.len() / scales.len();
    for ((codes, out), scale) in codes.chunks_exact(width).zip(out.chunks_exact_mut(width)).zip(scales) {
        widen(codes, out);
        update(out, [], |code, []| code * scale);
    }
}

#[inline(always)]
fn widen(codes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(codes).for_each(|(out, code)| *out = f32::from(code.cast_signed()));
}

#[cfg(test)]
mod tests {
    use super::super::Table;
    use super::*;

    /// Elements of a head: Miri takes a millisecond for each.
    const WIDTH: usize = if cfg!(miri) { 8 } else { 64 };

    fn cache(dtype: CacheType, tokens: usize) -> Cache {
        let mut cache = Cache::new(3, WIDTH, dtype, None);
        for _ in 0..tokens {
            cache.append(Table::best().light(), &[1.0; 3 * WIDTH], &[2.0; 3 * WIDTH], 0..1).unwrap();
        }
        cache
    }

    #[test]
    #[cfg_attr(miri, ignore = "long, and about lengths alone")]
    fn eight_bits_take_about_half_of_sixteen_and_the_spare_is_bounded() {
        let [f16, int8] = [CacheType::F16, CacheType::I8].map(|dtype| cache(dtype, 1000));
        let ratio = int8.capacity() as f64 / f16.capacity() as f64;
        assert!((0.5..0.56).contains(&ratio), "{ratio}");
        let least = 1000 * 2 * 192 * 2;
        assert!((least..least * 8 / 5).contains(&f16.capacity()), "{}", f16.capacity());
    }

    #[test]
    fn what_was_kept_comes_back_and_what_contradicts_itself_does_not() {
        let tokens = if cfg!(miri) { 70 } else { 300 };
        for (dtype, window) in [(CacheType::F32, None), (CacheType::F16, Some(40)), (CacheType::I8, None)] {
            let fill = |cache: &mut Cache, from: usize, to: usize| {
                for t in from..to {
                    let row = [(t % 7) as f32 - 3.0; 3 * WIDTH];
                    cache.append(Table::best().light(), &row, &row, 0..1).unwrap();
                }
            };
            let new = || Cache::new(3, WIDTH, dtype, window);
            let (mut whole, mut back) = (new(), new());
            fill(&mut whole, 0, tokens);
            // Some that were forgotten.
            fill(&mut whole, tokens, tokens + 3);
            assert_eq!(whole.rewind(tokens), tokens);
            let image = whole.image();
            assert!(back.restore(&image).unwrap() && back.len() == tokens);
            let mut other = new();
            for (len, dropped) in [(tokens + BLOCK, image.dropped), (tokens, image.dropped + 1), (usize::MAX, 0)] {
                let wrong = Image { len, dropped, ..image };
                assert!(!other.restore(&wrong).unwrap() && other.len() == 0, "{len} {dropped}");
            }
            assert!(!other.restore(&Image { blocks: &image.blocks[1..], ..image }).unwrap());
            // Both go on alike, over the end of the block.
            for cache in [&mut whole, &mut back] {
                fill(cache, tokens, tokens + BLOCK);
            }
            let (a, b) = (whole.image(), back.image());
            assert_eq!((a.len, a.dropped, a.scales), (b.len, b.dropped, b.scales), "{dtype:?}");
            assert!(a.blocks == b.blocks, "{dtype:?}");
        }
    }

    #[test]
    fn tiles_begin_on_cache_lines_and_keep_their_tokens_as_memory_grows() {
        for dtype in [CacheType::F32, CacheType::F16, CacheType::I8] {
            let tokens = if cfg!(miri) { 70 } else { 300 };
            let cache = cache(dtype, tokens);
            let [mut k, mut v] = [0; 2].map(|_| vec![0.0; WIDTH * BLOCK]);
            for block in 0..tokens.div_ceil(BLOCK) {
                assert!(cache.keys(block, 1, BLOCK).bytes.as_ptr().align_offset(LINE) == 0);
                cache.decode(Table::best(), block, 2, &mut k, &mut v);
                let held = BLOCK.min(tokens - block * BLOCK);
                assert!(k.chunks(BLOCK).all(|row| row[..held].iter().all(|x| *x == 1.0)), "{dtype:?} {block}");
                assert!(v[..held * WIDTH].iter().all(|x| *x == 2.0), "{dtype:?} {block}");
            }
        }
    }
}
