//! Views as tables for people, and as JSON for programs.

use comfy_table::{Table, presets};
use serde::{Serialize, Serializer};

use super::kernel::{Kernel, Name, Object};
use super::{Error, Report, Result};

/// A row of a table.
pub trait Row: Serialize {
    /// Headings of the columns.
    const COLUMNS: &'static [&'static str];

    /// What stands in the columns.
    fn cells(&self) -> Vec<String>;
}

/// What could be shown of an object.
#[derive(Serialize)]
#[serde(untagged)]
pub enum Line<T> {
    /// All.
    Good(T),
    /// Its name, and why no more.
    Broken {
        /// The object.
        name: Name,
        /// Why.
        error: String,
    },
}

/// A view that is a table.
#[derive(Serialize)]
pub struct Listing<T> {
    /// What to know when reading it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    /// The rows.
    pub rows: Vec<Line<T>>,
}

impl<T> Listing<T> {
    /// Describes all objects of a type.
    ///
    /// # Errors
    /// If the image is refused, or the arena cannot be read.
    pub fn of<'g>(
        kernel: &Kernel<'g>,
        kind: &str,
        mut describe: impl FnMut(&Object<'g>) -> Result<T>,
    ) -> Result<Self> {
        let objects = kernel.objects(kind)?;
        let mut notes = notes(kernel)?;
        let live = kernel.arena(kind)?.live;
        if live != objects.len() as u64 {
            notes.push(format!(
                "the kernel counts {live} of type {kind}, and {} are alive",
                objects.len()
            ));
        }
        let rows = objects.iter().map(|object| line(object, &mut describe));
        Ok(Self {
            rows: rows.collect::<Result<_>>()?,
            notes,
        })
    }
}

/// What to know of the kernel when reading any view.
///
/// # Errors
/// If the image is refused.
pub fn notes<'g>(kernel: &Kernel<'g>) -> Result<Vec<String>> {
    let busy = kernel.is_busy()?;
    let note = "the kernel is at work: what it changes may be half changed";
    Ok(busy.then(|| note.into()).into_iter().collect())
}

/// Describes an object; only an image that is refused is an error.
///
/// # Errors
/// As said.
pub fn line<'g, T>(
    object: &Object<'g>,
    mut describe: impl FnMut(&Object<'g>) -> Result<T>,
) -> Result<Line<T>> {
    match describe(object) {
        Ok(row) => Ok(Line::Good(row)),
        Err(refused @ Error::Image(_)) => Err(refused),
        Err(error) => Ok(Line::Broken {
            name: object.name.clone(),
            error: error.to_string(),
        }),
    }
}

impl<T: Row> Listing<T> {
    /// The view.
    ///
    /// # Errors
    /// None that are known.
    pub fn report(&self) -> Result<Report> {
        let mut text = String::new();
        for note in &self.notes {
            text.push_str(&format!("note: {note}\n"));
        }
        let mut table = table();
        table.set_header(T::COLUMNS);
        for row in &self.rows {
            if let Line::Good(row) = row {
                table.add_row(row.cells());
            }
        }
        text.push_str(&trimmed(&table));
        for row in &self.rows {
            if let Line::Broken { name, error } = row {
                text.push_str(&format!("{name}: {error}\n"));
            }
        }
        report(text, self)
    }
}

/// A table without lines.
pub fn table() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}

/// A table's text without blanks at the ends of lines.
pub fn trimmed(table: &Table) -> String {
    let lines = table.lines().map(|line| format!("{}\n", line.trim()));
    lines.collect()
}

/// A view.
///
/// # Errors
/// None that are known.
pub fn report(text: String, content: &impl Serialize) -> Result<Report> {
    let json = serde_json::to_value(content)
        .map_err(|error| Error::Corrupt(format!("it cannot be written as JSON: {error}")))?;
    Ok(Report { text, json })
}

/// Names with values, in order; an object in JSON.
pub struct Pairs<T>(pub Vec<(String, T)>);

impl<T: Serialize> Serialize for Pairs<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// A name, or a dash.
pub fn or_dash(name: &Option<impl ToString>) -> String {
    name.as_ref()
        .map_or_else(|| "-".into(), ToString::to_string)
}

/// An address.
pub fn hex(number: u64) -> String {
    format!("{number:#x}")
}

/// An address, or a dash for 0.
pub fn hex_or_dash(number: u64) -> String {
    match number {
        0 => "-".into(),
        _ => hex(number),
    }
}
