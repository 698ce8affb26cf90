//! What merging an adapter makes of a layer's own numbers, for methods whose effect can be had by other weights.

use std::ops::Range;

/// Changes of one linear layer's weight, a few rows at a time, and of its bias.
pub(super) trait Fold: Send + Sync {
    /// Changes `rows` of the weight `[out, in]`; they lie in `values` `[rows, in]`.
    fn weight(&self, rows: Range<usize>, values: &mut [f32]);

    /// The rows that must be there for `rows` to be changed, these among them.
    fn span(&self, rows: Range<usize>) -> Range<usize> {
        rows
    }

    /// Changes the bias `[out]`, if the layer has one.
    fn bias(&self, _bias: &mut [f32]) {}

    /// Whether it adds to the product of the layer: before anything changes what the layer reads or gives.
    fn is_term(&self) -> bool {
        false
    }

    /// Whether the layer must have a bias for that.
    fn needs_bias(&self) -> bool {
        false
    }
}

/// `W + factor B A` and `b + factor c`.
pub(super) struct LowRankFold {
    /// `[r, in]`.
    pub a: Vec<f32>,
    /// `[out, r]`.
    pub b: Vec<f32>,
    /// `r`.
    pub rank: usize,
    /// `c` `[out]`, the bias of B.
    pub bias: Option<Vec<f32>>,
    pub factor: f32,
}

impl Fold for LowRankFold {
    fn weight(&self, rows: Range<usize>, values: &mut [f32]) {
        let cols = self.a.len() / self.rank;
        for (row, values) in rows.zip(values.chunks_exact_mut(cols)) {
            let of_row = &self.b[row * self.rank..(row + 1) * self.rank];
            // B A first and the scale after, as PEFT rounds it.
            let mut change = vec![0.0; cols];
            for (b, a) in of_row.iter().zip(self.a.chunks_exact(cols)) {
                change.iter_mut().zip(a).for_each(|(change, a)| *change += b * a);
            }
            values.iter_mut().zip(&change).for_each(|(w, change)| *w += self.factor * change);
        }
    }

    fn bias(&self, bias: &mut [f32]) {
        let own = self.bias.iter().flatten();
        bias.iter_mut().zip(own).for_each(|(b, c)| *b += self.factor * c);
    }

    fn is_term(&self) -> bool {
        true
    }

    fn needs_bias(&self) -> bool {
        self.bias.is_some()
    }
}

/// What another makes of the weight, where the bias stays as it is.
pub(super) struct WeightFold(pub Box<dyn Fold>);

impl Fold for WeightFold {
    fn weight(&self, rows: Range<usize>, values: &mut [f32]) {
        self.0.weight(rows, values);
    }

    fn span(&self, rows: Range<usize>) -> Range<usize> {
        self.0.span(rows)
    }
}

/// `W diag(l)` with `l` `[in]`.
pub(super) struct InputFold(pub Vec<f32>);

impl Fold for InputFold {
    fn weight(&self, _rows: Range<usize>, values: &mut [f32]) {
        for row in values.chunks_exact_mut(self.0.len()) {
            row.iter_mut().zip(&self.0).for_each(|(w, l)| *w *= l);
        }
    }
}

/// `diag(l) W` and `l b` with `l` `[out]`.
pub(super) struct OutputFold(pub Vec<f32>);

impl Fold for OutputFold {
    fn weight(&self, rows: Range<usize>, values: &mut [f32]) {
        let cols = values.len() / rows.len().max(1);
        for (row, values) in rows.zip(values.chunks_exact_mut(cols.max(1))) {
            values.iter_mut().for_each(|w| *w *= self.0[row]);
        }
    }

    fn bias(&self, bias: &mut [f32]) {
        bias.iter_mut().zip(&self.0).for_each(|(b, l)| *b *= l);
    }
}
