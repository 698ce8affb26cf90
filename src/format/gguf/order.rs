//! Where llama.cpp's files have the rows of a checkpoint's tensor.

/// Where rows come from. The elements of a vector are its rows.
#[derive(Clone, Debug)]
pub(super) enum Order {
    /// From this row on.
    From(usize),
    /// From a row on, rows of each head of so many are interleaved, see [`interleaved_row`].
    Interleaved(usize, usize),
    /// So many rows of the first part, as many of the second, and so on.
    Halves(usize),
    /// Rows of the parts by turns, from this one on.
    Turns(usize),
    /// Each group of rows has so many of the first part's sections, then of the second.
    ByHead(ByHead),
    /// From a row on, heads lie in another order.
    Tiled(usize, Heads),
    /// The same for columns.
    Columns(Heads),
    /// Each head has `plain` columns of the first part, `[heads, columns, plain]`, then `value` rows of the second.
    Latent { plain: usize, value: usize },
    /// This number.
    Number(f32),
}

/// Heads of values: those of a head of keys lie together in checkpoints; here the first ones of all do, then the second ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    /// Heads of keys.
    pub(super) keys: usize,
    /// Heads of values for each.
    pub(super) per: usize,
    pub(super) width: usize,
}

impl Heads {
    pub(super) fn at(self, row: usize) -> usize {
        let (head, inside) = (row / self.width, row % self.width);
        let (key, value) = (head / self.per, head % self.per);
        (value * self.keys + key) * self.width + inside
    }
}

/// Queries, keys, values and gates of Qwen3-Next: of each head of keys in checkpoints, in the file all queries, all keys and
/// all values in one tensor, and gates in another.
#[derive(Clone, Copy, Debug)]
pub(super) struct ByHead {
    pub(super) keys: usize,
    /// Rows of a head of keys.
    pub(super) key: usize,
    /// Rows of the values of a head of keys.
    pub(super) value: usize,
}

impl ByHead {
    fn at(self, row: usize) -> (usize, usize) {
        let ByHead { keys, key, value } = self;
        let (head, inside) = (row / (2 * key + 2 * value), row % (2 * key + 2 * value));
        match inside {
            q if q < key => (0, head * key + q),
            k if k < 2 * key => (0, keys * key + head * key + k - key),
            v if v < 2 * key + value => (0, 2 * keys * key + head * value + v - 2 * key),
            z => (1, head * value + z - 2 * key - value),
        }
    }
}

impl Order {
    /// The part, and the row of it, that row `row` is.
    pub(super) fn at(&self, row: usize) -> (usize, usize) {
        match *self {
            Self::From(first) => (0, first + row),
            Self::Interleaved(first, head) => (0, first + interleaved_row(row, head)),
            Self::Halves(width) => (row / width % 2, row / width / 2 * width + row % width),
            Self::Turns(first) => (row % 2, first + row / 2),
            Self::ByHead(by_head) => by_head.at(row),
            Self::Tiled(start, heads) => (0, if row < start { row } else { start + heads.at(row - start) }),
            Self::Latent { plain, value } => {
                let (head, inside) = (row / (plain + value), row % (plain + value));
                (1, head * value + inside.saturating_sub(plain))
            }
            Self::Columns(_) | Self::Number(_) => (0, row),
        }
    }
}

/// The file's row for row `row` of a Hugging Face query or key projection with heads of `head_dim` rows.
///
/// Hugging Face rotates row j of a head with row j + head_dim/2; llama.cpp rotates neighbours, so its converter stores
/// that pair as rows 2j and 2j + 1 (`LlamaModel.permute` in llama.cpp's converter).
pub(crate) fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, r) = (row / head_dim, row % head_dim);
    let half = head_dim / 2;
    head * head_dim + 2 * (r % half) + r / half
}

#[cfg(test)]
mod tests {
    use super::interleaved_row;

    /// The converter's permutation, written as it is there: reshape(heads, 2, d/2), swap the last two, flatten.
    #[test]
    fn undoes_the_converters_permutation() {
        for (heads, d) in [(1, 2), (3, 4), (9, 64), (2, 6)] {
            let mut file = Vec::new();
            for h in 0..heads {
                for j in 0..d / 2 {
                    for k in 0..2 {
                        file.push(h * d + k * (d / 2) + j);
                    }
                }
            }
            for row in 0..heads * d {
                assert_eq!(file[interleaved_row(row, d)], row, "row {row} of {heads} heads of {d}");
            }
        }
    }
}
