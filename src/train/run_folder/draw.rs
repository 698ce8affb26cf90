//! What pictures of a run share: they are for light and dark pages.

use plotters::prelude::*;

/// Middle tones, which a white and a black page show equally well; the background is the page's.
pub(super) const INK: RGBColor = RGBColor(128, 128, 128);
pub(super) const TRAIN: RGBColor = RGBColor(59, 130, 246);
pub(super) const HELD_OUT: RGBColor = RGBColor(234, 100, 20);

pub(super) type Failure = Box<dyn std::error::Error>;
pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

/// A picture of `size` pixels.
pub(super) fn svg(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Result<(), Failure>) -> Result<String, String> {
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, size).into_drawing_area();
        draw(&root).and_then(|()| Ok(root.present()?)).map_err(|e| e.to_string())?;
    }
    Ok(text)
}

pub(super) fn font(size: u32) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}
