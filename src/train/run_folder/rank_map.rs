//! Ranks of layers as a map: a row for each layer of the model, a column for each of its places.

use super::super::{LayerRank, RankChoice};
use super::draw::{Area, Failure, HELD_OUT, INK, font, svg as drawn};
use crate::adapter::layer_of;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Of a cell, in pixels.
const WIDTH: i32 = 76;
const HEIGHT: i32 = 20;
/// Left of the cells and above them.
const LEFT: i32 = 60;
const ABOVE: i32 = 76;
const MARGIN: i32 = 16;

/// The number of the model's layer that a path is in, and the path in it; a path outside of layers has none.
fn place(path: &str) -> (Option<usize>, &str) {
    let layer = layer_of(path);
    let behind = layer.and_then(|layer| path.split_once(&format!(".{layer}.")));
    behind.map_or((None, path), |(_, rest)| (layer, rest))
}

/// The picture.
pub(super) fn svg(choice: &RankChoice) -> Result<String, String> {
    let (mut rows, mut columns): (Vec<Option<usize>>, Vec<&str>) = (Vec::new(), Vec::new());
    for layer in &choice.layers {
        let (row, column) = place(&layer.module);
        if !rows.contains(&row) {
            rows.push(row);
        }
        if !columns.contains(&column) {
            columns.push(column);
        }
    }
    let size = [LEFT + WIDTH * columns.len() as i32, ABOVE + HEIGHT * rows.len() as i32];
    let [width, height] = size.map(|pixels| (pixels + MARGIN).max(300) as u32);
    drawn((width, height), |root| draw(choice, &rows, &columns, root))
}

fn draw(choice: &RankChoice, rows: &[Option<usize>], columns: &[&str], root: &Area<'_>) -> Result<(), Failure> {
    root.draw(&Text::new("rank of each layer", (LEFT, 12), font(18)))?;
    let centred = |size| font(size).pos(Pos::new(HPos::Center, VPos::Center));
    let middle = |column: usize| LEFT + WIDTH * column as i32 + WIDTH / 2;
    for (i, name) in columns.iter().enumerate() {
        // The last part tells enough, and has room.
        let end = name.rsplit('.').next().unwrap_or(name);
        root.draw(&Text::new(end.to_owned(), (middle(i), ABOVE - 14), centred(12)))?;
    }
    let below = |row: usize| ABOVE + HEIGHT * row as i32;
    for (i, number) in rows.iter().enumerate() {
        let label = number.map_or_else(|| "-".to_owned(), |number| number.to_string());
        root.draw(&Text::new(label, (LEFT - 20, below(i) + HEIGHT / 2), centred(12)))?;
    }
    let most = choice.layers.iter().map(|layer| layer.rank).max().unwrap_or(1).max(1) as f64;
    for LayerRank { module, rank, .. } in &choice.layers {
        let (row, column) = place(module);
        let (Some(row), Some(column)) =
            (rows.iter().position(|r| *r == row), columns.iter().position(|c| *c == column))
        else {
            continue;
        };
        let corner = (LEFT + WIDTH * column as i32, below(row));
        let cell = [corner, (corner.0 + WIDTH - 2, corner.1 + HEIGHT - 2)];
        root.draw(&Rectangle::new(cell, HELD_OUT.mix(0.75 * *rank as f64 / most).filled()))?;
        root.draw(&Rectangle::new(cell, INK.mix(0.25)))?;
        root.draw(&Text::new(rank.to_string(), (middle(column), corner.1 + HEIGHT / 2), centred(12)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_has_its_cell() {
        for (path, expected) in [
            ("model.layers.3.self_attn.q_proj", (Some(3), "self_attn.q_proj")),
            ("model.layers.12.mlp.experts.5.up_proj", (Some(12), "mlp.experts.5.up_proj")),
            ("lm_head", (None, "lm_head")),
        ] {
            assert_eq!(place(path), expected);
        }
        let layer = |module: &str, rank| LayerRank { module: module.to_owned(), score: 1.0, shape: [4, 4], rank };
        let layers = vec![
            layer("model.layers.0.self_attn.q_proj", 7),
            layer("model.layers.1.self_attn.q_proj", 0),
            layer("lm_head", 11),
        ];
        let picture = svg(&RankChoice { budget: 100, layers }).unwrap();
        for text in ["q_proj", "lm_head", "7", "11"] {
            assert!(picture.contains(text), "{text}: {picture}");
        }
        // A frame for each of three layers, and a color for the two that have ranks.
        assert_eq!(picture.matches("<rect").count(), 5);
    }
}
