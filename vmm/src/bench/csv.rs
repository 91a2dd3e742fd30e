//! What was measured as comma-separated values: a line for each value.

use std::fmt::Write;

use super::model::Report;

/// Heading of the columns.
const HEADING: &str = "table,row,column,measure,unit,n,median,spread,low,high,min,max,missing";

/// The report.
pub fn render(report: &Report) -> String {
    let mut text = format!("{HEADING}\n");
    for table in &report.tables {
        for cell in &table.cells {
            let measure = format!("{:?}", cell.measure).to_lowercase();
            let unit = cell.measure.unit();
            let head = [&table.id, &cell.row, &cell.column, &measure, unit].map(field);
            let numbers = cell.summary.map_or_else(
                || ",,,,,,".into(),
                |s| {
                    format!(
                        "{},{},{},{},{},{},{}",
                        s.n, s.median, s.spread, s.interval.0, s.interval.1, s.min, s.max
                    )
                },
            );
            let missing = field(cell.missing.as_deref().unwrap_or_default());
            let _ = writeln!(text, "{},{numbers},{missing}", head.join(","));
        }
    }
    text
}

/// A field as RFC 4180 has it.
fn field(text: impl AsRef<str>) -> String {
    let text = text.as_ref();
    if text.contains([',', '"', '\n']) {
        return format!("\"{}\"", text.replace('"', "\"\""));
    }
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_with_commas_are_quoted() {
        assert_eq!(field("a"), "a");
        assert_eq!(field("a, b"), "\"a, b\"");
        assert_eq!(field("say \"a\""), "\"say \"\"a\"\"\"");
    }
}
