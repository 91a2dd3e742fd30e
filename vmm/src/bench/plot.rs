//! Pictures, as SVG.

use std::error::Error;

use plotters::coord::ranged1d::{AsRangedCoord, Ranged, ValueFormatter};
use plotters::prelude::{
    ChartBuilder, IntoDrawingArea, IntoLogRange, LineSeries, PathElement, Rectangle, SVGBackend,
    Text,
};
use plotters::style::{BLACK, Color, IntoFont, RGBColor, TextStyle, WHITE};

use super::model::{Measure, Plot, Table, in_order};

/// Width and height of a picture.
const SIZE: (u32, u32) = (860, 320);
/// More rows than that are a picture of nothing.
const ROWS_MAX: usize = 8;
/// One for each configuration.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0x33, 0x66, 0xaa),
    RGBColor(0x77, 0xaa, 0xdd),
    RGBColor(0x11, 0x88, 0x66),
    RGBColor(0xcc, 0x66, 0x33),
    RGBColor(0xee, 0xaa, 0x77),
    RGBColor(0x88, 0x55, 0x99),
];

type Drawn = Result<(), Box<dyn Error>>;

/// A picture, unless it cannot be drawn, which is no reason to keep the figures back.
fn picture(draw: impl FnOnce(&mut String) -> Drawn) -> Option<String> {
    let mut svg = String::new();
    match draw(&mut svg) {
        Ok(()) => Some(svg),
        Err(error) => {
            tracing::warn!("a picture is left out: {error}");
            None
        }
    }
}

fn colour(place: usize) -> RGBColor {
    COLOURS[place % COLOURS.len()]
}

/// The values of a table in one measure as bars with their 95 % intervals: multiples of the baseline if there is one, the
/// values themselves if not. None for a table of many rows, or nothing to show.
pub fn bars(table: &Table, measure: Measure) -> Option<String> {
    let cells = || {
        let of = table.cells.iter().filter(|cell| cell.measure == measure);
        of.filter(|cell| cell.summary.is_some())
    };
    let rows = in_order(cells().map(|cell| cell.row.as_str()));
    let columns = in_order(cells().map(|cell| cell.column.as_str()));
    if rows.is_empty() || rows.len() > ROWS_MAX || measure == Measure::Number {
        return None;
    }
    let summary = |row: &str, column: &str| table.cell(row, column, measure)?.summary;
    // Row, column, and lower end, middle and upper end of the interval.
    let mut found: Vec<(usize, usize, [f64; 3])> = Vec::new();
    for (r, row) in rows.iter().enumerate() {
        let baseline = table.baseline.as_deref();
        let base = baseline.and_then(|baseline| summary(row, baseline));
        let unit = base.map_or(1.0, |base| base.median);
        for (c, column) in columns.iter().enumerate() {
            if let Some(summary) = summary(row, column).filter(|_| unit != 0.0) {
                let values = [summary.interval.0, summary.median, summary.interval.1];
                found.push((r, c, values.map(|value| value / unit)));
            }
        }
    }
    let top = found
        .iter()
        .map(|(_, _, values)| values[2])
        .fold(0.0, f64::max);
    if top <= 0.0 {
        return None;
    }
    let title = match table.baseline {
        Some(_) => format!("{}, as multiples of Process NP's", measure.heading()),
        None => measure.heading().to_string(),
    };
    picture(|svg| {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        root.fill(&WHITE)?;
        let mut chart = ChartBuilder::on(&root)
            .caption(title, ("sans-serif", 15).into_font())
            .margin(8)
            .set_all_label_area_size(0)
            .x_label_area_size(28)
            .y_label_area_size(56)
            .build_cartesian_2d(-0.05f64..rows.len() as f64 + 0.9, 0.0..top * 1.08)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(0)
            .y_labels(6)
            .draw()?;
        let width = 0.85 / columns.len() as f64;
        for (r, c, [low, middle, high]) in &found {
            let left = *r as f64 + *c as f64 * width;
            let centre = left + width / 2.0;
            chart.draw_series([Rectangle::new(
                [(left + 0.1 * width, 0.0), (left + 0.9 * width, *middle)],
                colour(*c).filled(),
            )])?;
            chart.draw_series([PathElement::new([(centre, *low), (centre, *high)], BLACK)])?;
        }
        let style = TextStyle::from(("sans-serif", 12).into_font());
        for (r, row) in rows.iter().enumerate() {
            let at = chart.backend_coord(&(r as f64, 0.0));
            root.draw(&Text::new(
                (*row).to_string(),
                (at.0, at.1 + 6),
                style.clone(),
            ))?;
        }
        legend(&root, &columns)?;
        root.present()?;
        drop(chart);
        Ok(())
    })
}

/// Names and their colours, at the right.
fn legend<D: plotters::prelude::DrawingBackend>(
    root: &plotters::drawing::DrawingArea<D, plotters::coord::Shift>,
    names: &[&str],
) -> Drawn
where
    D::ErrorType: 'static,
{
    let style = TextStyle::from(("sans-serif", 12).into_font());
    for (place, name) in names.iter().enumerate() {
        let (x, y) = (SIZE.0 as i32 - 116, 34 + 16 * place as i32);
        root.draw(&Rectangle::new(
            [(x, y), (x + 10, y + 10)],
            colour(place).filled(),
        ))?;
        root.draw(&Text::new((*name).to_string(), (x + 14, y), style.clone()))?;
    }
    Ok(())
}

/// Curves; none if there is nothing to draw.
pub fn curves(plot: &Plot) -> Option<String> {
    let points = || plot.series.iter().flat_map(|series| &series.points);
    let least = points().map(|point| point.0).fold(f64::INFINITY, f64::min);
    let most = points().map(|point| point.0).fold(0.0, f64::max);
    let top = points().map(|point| point.1).fold(0.0, f64::max);
    if !least.is_finite() || top <= 0.0 {
        return None;
    }
    picture(|svg| {
        if plot.logarithmic {
            let range = (least.max(1e-3)..most.max(least * 1.1) * 1.1).log_scale();
            draw(svg, plot, range, top)
        } else {
            draw(svg, plot, 0.0..most * 1.02, top)
        }
    })
}

fn draw<X>(svg: &mut String, plot: &Plot, x: X, top: f64) -> Drawn
where
    X: AsRangedCoord<Value = f64>,
    X::CoordDescType: Ranged<ValueType = f64> + ValueFormatter<f64>,
{
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(&plot.title, ("sans-serif", 15).into_font())
        .margin(8)
        .margin_right(130)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(x, 0.0..top * 1.05)?;
    chart
        .configure_mesh()
        .x_desc(&plot.x)
        .y_desc(&plot.y)
        .light_line_style(WHITE)
        .draw()?;
    for (place, series) in plot.series.iter().enumerate() {
        let line = series.points.iter().copied();
        chart.draw_series(LineSeries::new(line, colour(place).stroke_width(2)))?;
    }
    let names: Vec<&str> = plot
        .series
        .iter()
        .map(|series| series.name.as_str())
        .collect();
    legend(&root, &names)?;
    root.present()?;
    drop(chart);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::model::{Cell, Series};

    #[test]
    fn curves_become_lines_on_either_axis() {
        for logarithmic in [true, false] {
            let plot = Plot {
                title: "how late".into(),
                x: "us".into(),
                y: "part".into(),
                logarithmic,
                series: vec![Series {
                    name: "process-np".into(),
                    points: vec![(1.0, 0.5), (1000.0, 1.0)],
                }],
            };
            let svg = curves(&plot).unwrap();
            assert!(svg.starts_with("<svg") && svg.contains("polyline"), "{svg}");
            assert!(
                svg.contains("how late") && svg.contains("process-np"),
                "{svg}"
            );
        }
    }

    #[test]
    fn there_is_no_picture_of_nothing_or_too_much() {
        assert_eq!(bars(&Table::default(), Measure::Cycles), None);
        let cell = |n: usize| Cell::new(n.to_string(), "a", Measure::Cycles, vec![1.0], 1);
        let table = |rows| Table {
            cells: (0..rows).map(cell).collect(),
            ..Table::default()
        };
        assert!(bars(&table(3), Measure::Cycles).is_some());
        assert_eq!(bars(&table(ROWS_MAX + 1), Measure::Cycles), None);
    }
}
