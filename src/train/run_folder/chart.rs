//! Losses over steps, and the learning rate below them, as an SVG for light and dark pages.

use super::curves::Curves;
use super::draw::{Area, Failure, HELD_OUT, INK, TRAIN, font, svg as drawn};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

const SIZE: (u32, u32) = (840, 520);
/// Height of the losses; the rest is the learning rate's.
const LOSSES: u32 = 360;
const GENERAL: RGBColor = RGBColor(22, 163, 74);

/// A curve of the upper part.
struct Curve<'c> {
    points: &'c [(f64, f64)],
    color: RGBColor,
    label: String,
    /// Its points are few and shown.
    dots: bool,
}

/// The picture.
pub(super) fn svg(curves: &Curves) -> Result<String, String> {
    drawn(SIZE, |root| draw(curves, root))
}

fn draw(curves: &Curves, root: &Area<'_>) -> Result<(), Failure> {
    let (upper, lower) = root.split_vertically(LOSSES);
    let losses = [
        Curve { points: &curves.train, color: TRAIN, label: train_label(curves.width), dots: false },
        Curve { points: &curves.held_out, color: HELD_OUT, label: "held-out".into(), dots: true },
        Curve { points: &curves.general, color: GENERAL, label: "general text (forgetting)".into(), dots: true },
    ];
    let used: Vec<Curve<'_>> = losses.into_iter().filter(|curve| !curve.points.is_empty()).collect();
    let last = used.iter().flat_map(|curve| curve.points).map(|p| p.0).fold(1.0, f64::max);
    draw_losses(&upper, &used, last)?;
    draw_rate(&lower, &curves.rate, last)
}

fn train_label(width: u64) -> String {
    if width > 1 { format!("train (means of {width} steps)") } else { "train".to_owned() }
}

fn draw_losses(area: &Area<'_>, curves: &[Curve<'_>], last: f64) -> Result<(), Failure> {
    let values = curves.iter().flat_map(|curve| curve.points).map(|p| p.1);
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
    let margin = ((high - low) * 0.06).max(0.01);
    area.draw(&Text::new("loss (nats per token)", (76, 12), font(18)))?;
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .margin_top(64)
        .margin_right(24)
        .set_label_area_size(LabelAreaPosition::Left, 64)
        .set_label_area_size(LabelAreaPosition::Bottom, 26)
        .build_cartesian_2d(0.0..last, (low - margin).max(0.0)..high + margin)?;
    mesh(&mut chart, "loss", 8, &|v| format!("{v:.2}"))?;
    for Curve { points, color, dots, .. } in curves {
        chart.draw_series(LineSeries::new(points.iter().copied(), stroke(*color)))?;
        if *dots {
            chart.draw_series(points.iter().map(|&p| Circle::new(p, 3, color.filled())))?;
        }
    }
    draw_legend(area, curves)
}

fn stroke(color: RGBColor) -> ShapeStyle {
    ShapeStyle::from(color).stroke_width(2)
}

/// One line under the title, where no curve can lie.
fn draw_legend(area: &Area<'_>, curves: &[Curve<'_>]) -> Result<(), Failure> {
    const Y: i32 = 46;
    let mut x = 76;
    for Curve { color, label, .. } in curves {
        area.draw(&PathElement::new([(x, Y), (x + 20, Y)], stroke(*color)))?;
        let beside = font(14).pos(Pos::new(HPos::Left, VPos::Center));
        area.draw(&Text::new(label.as_str(), (x + 26, Y), beside))?;
        // Letters are some eight pixels wide at most; the exact widths depend on the reader's font.
        x += 50 + 8 * label.len() as i32;
    }
    Ok(())
}

fn draw_rate(area: &Area<'_>, points: &[(f64, f64)], last: f64) -> Result<(), Failure> {
    let high = points.iter().map(|p| p.1).fold(0.0, f64::max);
    let high = if high > 0.0 { high * 1.1 } else { 1.0 };
    area.draw(&Text::new("learning rate", (76, 8), font(16)))?;
    let mut chart = ChartBuilder::on(area)
        .margin(12)
        .margin_top(30)
        .margin_right(24)
        .set_label_area_size(LabelAreaPosition::Left, 64)
        .set_label_area_size(LabelAreaPosition::Bottom, 40)
        .build_cartesian_2d(0.0..last, 0.0..high)?;
    mesh(&mut chart, "rate", 3, &|&v| if v == 0.0 { "0".to_owned() } else { format!("{v:.1e}") })?;
    chart.draw_series(LineSeries::new(points.iter().copied(), stroke(INK)))?;
    let (width, height) = area.dim_in_pixel();
    let below = font(14).pos(Pos::new(HPos::Center, VPos::Bottom));
    area.draw(&Text::new("step", (width as i32 / 2, height as i32 - 4), below))?;
    Ok(())
}

type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

/// Axes with ticks, and faint lines at them.
fn mesh(chart: &mut Chart<'_, '_>, name: &str, ticks: usize, label: &dyn Fn(&f64) -> String) -> Result<(), Failure> {
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(INK.mix(0.25))
        .axis_style(INK)
        .label_style(font(13))
        .axis_desc_style(font(14))
        .x_labels(10)
        .y_labels(ticks)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .y_label_formatter(label)
        .y_desc(name)
        .draw()?;
    Ok(())
}
