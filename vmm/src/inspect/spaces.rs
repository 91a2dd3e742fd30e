//! Spaces with the mapping hierarchy: what each imports, from where in the end, and what it exports.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt::Write;

use fluke_abi::layout::PAGE_SIZE;
use fluke_abi::state::Prot;
use serde::Serialize;

use super::kernel::{Kernel, Members, Name, Object, memory_of};
use super::table::{Line, Listing, Row, hex, line, notes, or_dash, report};
use super::value::{Guest, Value};
use super::{Error, Report, Result};
use crate::paging::Entry;

/// Most steps of a way to physical memory; the kernel itself takes fewer.
const STEPS_MAX: usize = 32;
/// Entries of a page table; the upper half of a top table's is the kernel's.
const ENTRIES: u64 = 512;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// A region.
#[derive(Serialize)]
struct Region {
    name: Name,
    hash: u64,
    memory: u64,
    /// First address in the exporting space.
    start: u64,
    size: u64,
    prot: String,
    space: Option<Name>,
    keeper: Option<Name>,
    /// Mappings of it that are in effect.
    mappings: Members,
}

impl Row for Region {
    const COLUMNS: &'static [&'static str] = &[
        "REGION", "HASH", "MEMORY", "SPACE", "RANGE", "PROT", "KEEPER", "MAPPINGS",
    ];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.index.to_string(),
            self.hash.to_string(),
            hex(self.memory),
            or_dash(&self.space.as_ref().map(|space| space.index)),
            range(self.start, self.size),
            self.prot.clone(),
            or_dash(&self.keeper),
            self.mappings.to_string(),
        ]
    }
}

/// A mapping.
#[derive(Clone, Serialize)]
struct Mapping {
    name: Name,
    hash: u64,
    start: u64,
    size: u64,
    prot: String,
    /// Regions on the way to physical memory, from the first address of the mapping on.
    through: Vec<Step>,
    /// Physical address of that memory; none if there is none.
    physical: Option<u64>,
    /// Where the way ends, if not there.
    end: Option<String>,
}

/// A step in the hierarchy: memory is that of a region.
#[derive(Clone, Serialize)]
struct Step {
    region: Name,
    /// Bytes into the region.
    offset: u64,
    /// Exporting space.
    space: Option<Name>,
    /// The address there.
    address: u64,
    keeper: Option<Name>,
}

/// A space.
#[derive(Serialize)]
pub struct Space {
    name: Name,
    hash: u64,
    memory: u64,
    /// Whether it may end the machine.
    root: bool,
    /// Whether it is the kernel's own, whose page tables are the host's.
    own: bool,
    /// Physical address of its top page table.
    page_table: u64,
    /// Pages that its page tables take.
    tables: u64,
    /// Pages that they map at this moment.
    mapped: u64,
    keeper: Option<Name>,
    threads: Vec<Name>,
    mappings: Vec<Line<Mapping>>,
    regions: Vec<Line<Region>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// The view of regions.
pub fn regions(kernel: &Kernel<'_>) -> Result<Report> {
    Listing::of(kernel, "region", |object| region(kernel, object))?.report()
}

fn region(kernel: &Kernel<'_>, object: &Object<'_>) -> Result<Region> {
    let value = object.value;
    Ok(Region {
        name: object.name.clone(),
        hash: value.field("header")?.field("hash")?.int()?,
        memory: memory_of(value.field("header")?)?,
        start: value.field("start")?.int()?,
        size: value.field("size")?.int()?,
        prot: prot(value.field("prot")?)?,
        space: kernel.name_in(value.field("space")?)?,
        keeper: kernel.name_in(value.field("keeper")?)?,
        mappings: kernel.members(value.field("mappings")?)?,
    })
}

/// The mappings in effect and the threads, by the space that they are in.
struct Hierarchy<'k, 'g> {
    kernel: &'k Kernel<'g>,
    /// Index of the space; threads.
    threads: BTreeMap<u64, Vec<Name>>,
    /// Index of the space; first address, bytes.
    mappings: BTreeMap<u64, Vec<(u64, u64, Object<'g>)>>,
}

impl<'k, 'g> Hierarchy<'k, 'g> {
    fn new(kernel: &'k Kernel<'g>) -> Result<Self> {
        let mut mappings: BTreeMap<u64, Vec<_>> = BTreeMap::new();
        for object in kernel.objects("mapping")? {
            let place = || {
                let space = kernel.name_in(object.value.field("space")?)?;
                let start = object.value.field("start")?.int()?;
                Ok((space, start, object.value.field("size")?.int()?))
            };
            match place() {
                Ok((Some(space), start, size)) if space.alive => {
                    let inside = mappings.entry(space.index).or_default();
                    inside.push((start, size, object));
                }
                Err(refused @ Error::Image(_)) => return Err(refused),
                // Of no effect, or shown to be broken where it is missing from its space.
                _ => {}
            }
        }
        for inside in mappings.values_mut() {
            inside.sort_by_key(|(start, ..)| *start);
        }
        let mut threads: BTreeMap<u64, Vec<_>> = BTreeMap::new();
        for thread in kernel.objects("thread")? {
            match kernel.name_in(thread.value.field("space")?) {
                Ok(Some(space)) if space.alive => {
                    threads.entry(space.index).or_default().push(thread.name);
                }
                Err(refused @ Error::Image(_)) => return Err(refused),
                _ => {}
            }
        }
        Ok(Self {
            kernel,
            threads,
            mappings,
        })
    }

    fn inside(&self, space: &Name) -> &[(u64, u64, Object<'g>)] {
        self.mappings.get(&space.index).map_or(&[], Vec::as_slice)
    }

    fn mapping(&self, object: &Object<'g>) -> Result<Mapping> {
        let value = object.value;
        let mut mapping = Mapping {
            name: object.name.clone(),
            hash: value.field("header")?.field("hash")?.int()?,
            start: value.field("start")?.int()?,
            size: value.field("size")?.int()?,
            prot: prot(value.field("prot")?)?,
            through: Vec::new(),
            physical: None,
            end: None,
        };
        let (mut at, mut offset) = (value, 0u64);
        while mapping.end.is_none() && mapping.physical.is_none() {
            let (kind, source) = at.field("source")?.variant()?;
            match kind.as_str() {
                "Physical" => {
                    let start = source.field("__0")?.int()?;
                    mapping.physical = Some(start.wrapping_add(offset));
                }
                "Region" => {
                    let into = source.field("__1")?.int()?.wrapping_add(offset);
                    match self.step(source.field("__0")?, into, &mut mapping)? {
                        Some((next, rest)) => (at, offset) = (next, rest),
                        None if mapping.end.is_none() => mapping.end = Some("nothing".into()),
                        None => {}
                    }
                }
                _ => mapping.end = Some("nothing".into()),
            }
        }
        Ok(mapping)
    }

    /// Goes through a region: the mapping that gives its memory, and how far into that it is.
    fn step(
        &self,
        region: Value<'g>,
        offset: u64,
        mapping: &mut Mapping,
    ) -> Result<Option<(Value<'g>, u64)>> {
        let (name, region) = self.kernel.find(region)?;
        let Some(region) = region else {
            mapping.end = Some(name.to_string());
            return Ok(None);
        };
        if mapping.through.len() >= STEPS_MAX {
            mapping.end = Some(format!("more than {STEPS_MAX} regions"));
            return Ok(None);
        }
        let address = region.field("start")?.int()?.wrapping_add(offset);
        let space = self.kernel.name_in(region.field("space")?)?;
        mapping.through.push(Step {
            region: name,
            offset,
            space: space.clone(),
            address,
            keeper: self.kernel.name_in(region.field("keeper")?)?,
        });
        let inside = space.as_ref().map_or(&[][..], |space| self.inside(space));
        let after = inside.partition_point(|(start, ..)| *start <= address);
        let before = after.checked_sub(1).and_then(|last| inside.get(last));
        let found = before.filter(|(start, size, _)| address - start < *size);
        if found.is_none() {
            mapping.end = Some("no mapping yet".into());
        }
        Ok(found.map(|(start, _, object)| (object.value, address - start)))
    }

    /// Checks that the tree of a space's mappings has those that say that they are in the space.
    fn check_tree(&self, space: &Object<'g>) -> Result<()> {
        let inside = self.inside(&space.name).iter();
        let inside: BTreeSet<_> = inside.map(|(.., object)| object.name.index).collect();
        let mut links = vec![space.value.field("mappings")?.field("root")?];
        let mut seen = 0;
        while let Some(link) = links.pop() {
            let Some(id) = link.option()? else { continue };
            let (name, mapping) = self.kernel.find(id)?;
            seen += 1;
            let known = inside.contains(&name.index);
            let (Some(mapping), true, true) = (mapping, known, seen <= inside.len()) else {
                return Err(Error::Corrupt(format!(
                    "the tree of mappings of {} is wrong at {name}",
                    space.name
                )));
            };
            let children = mapping.field("children")?;
            links.extend([children.field("__0")?, children.field("__1")?]);
        }
        match seen == inside.len() {
            true => Ok(()),
            false => Err(Error::Corrupt(format!(
                "the tree of mappings of {} has {seen} of {}",
                space.name,
                inside.len()
            ))),
        }
    }
}

impl Mapping {
    fn source(&self) -> String {
        let mut text = String::new();
        for step in &self.through {
            let keeper = step
                .keeper
                .as_ref()
                .map(|keeper| format!(", keeper {keeper}"));
            let _ = write!(
                text,
                "{} +{:#x} ({:#x} of {}{}) <- ",
                step.region,
                step.offset,
                step.address,
                or_dash(&step.space),
                keeper.unwrap_or_default(),
            );
        }
        match (self.physical, &self.end) {
            (Some(physical), _) => format!("{text}physical {physical:#x}"),
            (None, end) => text + end.as_deref().unwrap_or("nothing"),
        }
    }
}

/// All spaces.
#[derive(Serialize)]
struct Spaces {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    notes: Vec<String>,
    rows: Vec<Line<Space>>,
}

/// The view of spaces, or of one.
pub fn spaces(kernel: &Kernel<'_>, only: Option<u64>) -> Result<Report> {
    let hierarchy = Hierarchy::new(kernel)?;
    let objects = match only {
        Some(index) => vec![kernel.object("space", index)?],
        None => kernel.objects("space")?,
    };
    let mut spaces = Spaces {
        notes: notes(kernel)?,
        rows: Vec::new(),
    };
    for object in &objects {
        let describe = |object: &Object<'_>| space(&hierarchy, object);
        spaces.rows.push(line(object, describe)?);
    }
    let mut text = String::new();
    for note in &spaces.notes {
        let _ = writeln!(text, "note: {note}");
    }
    for row in &spaces.rows {
        show(&mut text, row);
    }
    report(text, &spaces)
}

fn space(hierarchy: &Hierarchy<'_, '_>, object: &Object<'_>) -> Result<Space> {
    let kernel = hierarchy.kernel;
    let object = kernel.object("space", object.name.index)?;
    let value = object.value;
    let page_table = value.field("page_table")?.int()?;
    let (tables, mapped) = page_tables(kernel.guest, page_table)?;
    let mut mappings = Vec::new();
    for (.., mapping) in hierarchy.inside(&object.name) {
        mappings.push(line(mapping, |_| hierarchy.mapping(mapping))?);
    }
    let mut regions = Vec::new();
    let mut error = hierarchy.check_tree(&object).err();
    for member in kernel.queue(value.field("regions")?)? {
        match member {
            Ok(member) => regions.push(line(&member, |member| region(kernel, member))?),
            Err(broken) => error = Some(broken),
        }
    }
    if let Some(refused @ Error::Image(_)) = error {
        return Err(refused);
    }
    let root = kernel.name_in(kernel.kernel.field("root")?)?;
    let threads = hierarchy.threads.get(&object.name.index);
    Ok(Space {
        hash: value.field("header")?.field("hash")?.int()?,
        memory: memory_of(value.field("header")?)?,
        root: root.as_ref() == Some(&object.name),
        own: kernel.name(kernel.kernel.field("own_space")?)? == object.name,
        page_table,
        tables,
        mapped,
        keeper: kernel.name_in(value.field("keeper")?)?,
        threads: threads.cloned().unwrap_or_default(),
        mappings,
        regions,
        error: error.map(|error| error.to_string()),
        name: object.name,
    })
}

fn show(text: &mut String, row: &Line<Space>) {
    let space = match row {
        Line::Good(space) => space,
        Line::Broken { name, error } => {
            let _ = writeln!(text, "{name}: {error}");
            return;
        }
    };
    let threads: Vec<_> = space.threads.iter().map(|t| t.index.to_string()).collect();
    let _ = writeln!(
        text,
        "{}{}: hash {}, memory {}, page table {} ({} pages, which map {}), keeper {}, threads {}",
        space.name,
        match (space.root, space.own) {
            (true, _) => ", the root",
            (_, true) => ", the kernel's own",
            _ => "",
        },
        space.hash,
        hex(space.memory),
        hex(space.page_table),
        space.tables,
        space.mapped,
        or_dash(&space.keeper),
        match threads.is_empty() {
            true => "none".into(),
            false => threads.join(" "),
        },
    );
    for mapping in &space.mappings {
        let _ = match mapping {
            Line::Good(m) => writeln!(
                text,
                "  {:27} {} {} <- {}",
                range(m.start, m.size),
                m.prot,
                m.name,
                m.source()
            ),
            Line::Broken { name, error } => writeln!(text, "  {name}: {error}"),
        };
    }
    for region in &space.regions {
        let _ = match region {
            Line::Good(r) => {
                let keeper = r.keeper.as_ref().map(|keeper| format!(", keeper {keeper}"));
                writeln!(
                    text,
                    "  {:27} {} -> {}{}, {} mappings",
                    range(r.start, r.size),
                    r.prot,
                    r.name,
                    keeper.unwrap_or_default(),
                    r.mappings.names.len()
                )
            }
            Line::Broken { name, error } => writeln!(text, "  {name}: {error}"),
        };
    }
    if let Some(error) = &space.error {
        let _ = writeln!(text, "  {error}");
    }
}

/// Pages of the page tables of a space's half, and pages that they map.
fn page_tables(guest: &Guest<'_>, root: u64) -> Result<(u64, u64)> {
    let mut tables = HashSet::from([root]);
    let mut mapped = 0;
    let mut below = vec![(root, 3u32)];
    while let Some((table, level)) = below.pop() {
        let mut page = [0; PAGE_SIZE as usize];
        let read = guest.memory.read(table & ADDRESS, &mut page);
        read.map_err(|_| Error::Corrupt(format!("a page table at {table:#x}")))?;
        let entries = if level == 3 { ENTRIES / 2 } else { ENTRIES };
        for entry in page.chunks_exact(8).take(entries as usize) {
            let entry = entry
                .iter()
                .rev()
                .fold(0, |n, byte| n << 8 | u64::from(*byte));
            if entry & Entry::PRESENT.bits() == 0 {
                continue;
            }
            if level == 0 {
                mapped += 1;
                continue;
            }
            if !tables.insert(entry & ADDRESS) {
                return Err(Error::Corrupt(format!(
                    "the page table at {:#x} is used twice",
                    entry & ADDRESS
                )));
            }
            below.push((entry & ADDRESS, level - 1));
        }
    }
    Ok((tables.len() as u64, mapped))
}

fn range(start: u64, size: u64) -> String {
    format!("{start:#x}-{:#x}", start.wrapping_add(size))
}

fn prot(value: Value<'_>) -> Result<String> {
    let prot = Prot::from_bits_truncate(value.int()?);
    let letter = |flag, letter| if prot.contains(flag) { letter } else { '-' };
    let letters = [
        letter(Prot::READ, 'r'),
        letter(Prot::WRITE, 'w'),
        letter(Prot::EXECUTE, 'x'),
    ];
    Ok(letters.iter().collect())
}
