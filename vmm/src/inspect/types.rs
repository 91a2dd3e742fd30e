//! Types and statics of a kernel image, as its own debug information describes them.
//!
//! Nothing of a layout is written down here: where a field lies, how long an element is, which value
//! means which variant, all that is read from the image's DWARF, a type at a time when first asked for.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use addr2line::gimli::{
    AttributeValue, DebuggingInformationEntry, Dwarf, EndianSlice, LittleEndian, Operation,
    SectionId, Unit, UnitOffset, constants as dw,
};
use object::{Object, ObjectSection};

use super::{Error, Result};

type Slice<'a> = EndianSlice<'a, LittleEndian>;
type Die<'a> = DebuggingInformationEntry<Slice<'a>>;

/// A type of the image: where the debug information describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TypeId(usize);

/// A type.
#[derive(Debug)]
pub struct Type {
    /// Its name, with the paths of its parameters, such as `Id<fluke_kernel::thread::Thread>`.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// What it is made of.
    pub kind: Kind,
}

/// What a type is made of.
#[derive(Debug)]
pub enum Kind {
    /// An integer, or a character.
    Integer {
        /// Whether it has a sign.
        signed: bool,
    },
    /// A truth value.
    Bool,
    /// A pointer or reference, and to what.
    Pointer(Option<TypeId>),
    /// An array.
    Array {
        /// Type of an element.
        element: TypeId,
        /// Number of elements.
        count: u64,
    },
    /// A structure, tuple or union.
    Struct(Vec<Member>),
    /// An enumeration without data: values and names.
    Names(Vec<(u64, String)>),
    /// An enumeration whose variants have data.
    Variants {
        /// What tells the variants apart; none if there is only one.
        discriminant: Option<Member>,
        /// The variants.
        variants: Vec<Variant>,
    },
    /// Something else.
    Other,
}

/// A field.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its name; those of tuples are `__0` and so on.
    pub name: String,
    /// Where it lies, bytes from the start.
    pub offset: u64,
    /// Its type.
    pub ty: TypeId,
}

/// A variant of an enumeration.
#[derive(Clone, Debug)]
pub struct Variant {
    /// The discriminant's value; none for the variant that all other values mean.
    pub value: Option<u64>,
    /// Name, and the structure of its fields.
    pub member: Member,
}

/// A static of the image.
#[derive(Clone, Copy, Debug)]
pub struct Static {
    /// Virtual address.
    pub address: u64,
    /// Type.
    pub ty: TypeId,
}

/// The types and statics of an image.
pub struct Types<'a> {
    dwarf: Dwarf<Slice<'a>>,
    /// In the order in which they lie in the debug information.
    units: Vec<Unit<Slice<'a>>>,
    /// By path, such as `fluke_kernel::lock::LOCKED`.
    statics: HashMap<String, Static>,
    named: HashMap<String, TypeId>,
    loaded: RefCell<HashMap<TypeId, Rc<Type>>>,
}

/// What an image says of its layouts. (A trait, so that who uses it need not carry the lifetimes of what
/// reads the debug information.)
pub trait Layouts {
    /// A static by its path.
    ///
    /// # Errors
    /// If the image has none of that name.
    fn find_static(&self, path: &str) -> Result<Static>;

    /// A type by its path.
    ///
    /// # Errors
    /// If the image has none of that name.
    fn find(&self, path: &str) -> Result<TypeId>;

    /// What a type is.
    ///
    /// # Errors
    /// If its description cannot be read.
    fn get(&self, id: TypeId) -> Result<Rc<Type>>;
}

impl Layouts for Types<'_> {
    fn find_static(&self, path: &str) -> Result<Static> {
        let found = self.statics.get(path).copied();
        found.ok_or_else(|| lacks(&format!("static `{path}`")))
    }

    fn find(&self, path: &str) -> Result<TypeId> {
        let found = self.named.get(path).copied();
        found.ok_or_else(|| lacks(&format!("type `{path}`")))
    }

    fn get(&self, id: TypeId) -> Result<Rc<Type>> {
        if let Some(ty) = self.loaded.borrow().get(&id) {
            return Ok(ty.clone());
        }
        let ty = Rc::new(self.load(id)?);
        self.loaded.borrow_mut().insert(id, ty.clone());
        Ok(ty)
    }
}

impl<'a> Types<'a> {
    /// Reads the debug information of an ELF image as far as it must be to find the rest.
    ///
    /// # Errors
    /// If there is none, or it is broken.
    pub fn new(image: &'a [u8]) -> Result<Self> {
        let file =
            object::File::parse(image).map_err(|e| Error::Image(format!("is no ELF file: {e}")))?;
        if file.section_by_name(SectionId::DebugInfo.name()).is_none() {
            return Err(Error::Image(
                "carries no debug information, so nothing is known of its structures; build it \
                 with `debug = 2` and do not strip it"
                    .into(),
            ));
        }
        let dwarf = Dwarf::load(|id: SectionId| {
            let section = file.section_by_name(id.name());
            let data = section.and_then(|s| s.data().ok()).unwrap_or(&[]);
            Ok::<_, addr2line::gimli::Error>(EndianSlice::new(data, LittleEndian))
        })
        .map_err(broken)?;
        let mut units = Vec::new();
        let mut headers = dwarf.units();
        while let Some(header) = headers.next().map_err(broken)? {
            units.push(dwarf.unit(header).map_err(broken)?);
        }
        let mut types = Self {
            dwarf,
            units,
            statics: HashMap::new(),
            named: HashMap::new(),
            loaded: RefCell::default(),
        };
        for number in 0..types.units.len() {
            types.index(number).map_err(broken)?;
        }
        Ok(types)
    }

    /// Notes the statics and types that lie directly in namespaces.
    fn index(&mut self, number: usize) -> addr2line::gimli::Result<()> {
        let (mut statics, mut named) = (Vec::new(), Vec::new());
        let unit = &self.units[number];
        // The namespaces around the entry: depth and path.
        let mut path: Vec<(isize, String)> = Vec::new();
        let mut entries = unit.entries_raw(None)?;
        let mut die = Die::null();
        while !entries.is_empty() {
            let depth = entries.next_depth();
            if !entries.read_entry(&mut die)? {
                continue;
            }
            while path.last().is_some_and(|(outer, _)| *outer >= depth) {
                path.pop();
            }
            // Beside namespaces, only the unit itself is above what counts.
            let inside = path.last().map_or(0, |(outer, _)| *outer) + 1 == depth;
            let tag = die.tag();
            if !inside
                || !(tag == dw::DW_TAG_namespace || tag == dw::DW_TAG_variable || is_type(tag))
            {
                continue;
            }
            let Some(name) = self.name(unit, &die) else {
                continue;
            };
            let full = match path.last() {
                Some((_, outer)) => format!("{outer}::{name}"),
                None => name,
            };
            if tag == dw::DW_TAG_namespace {
                path.push((depth, full));
            } else if tag == dw::DW_TAG_variable {
                let address = address(unit, &die);
                if let (Some(address), Some(ty)) = (address, self.target(unit, &die)) {
                    statics.push((full, Static { address, ty }));
                }
            } else if let Some(id) = id(unit, die.offset()) {
                named.push((full, id));
            }
        }
        self.statics.extend(statics);
        self.named.extend(named);
        Ok(())
    }

    fn load(&self, id: TypeId) -> Result<Type> {
        let after = |unit: &Unit<Slice<'a>>| start(unit).is_some_and(|start| start <= id.0);
        let number = self.units.partition_point(after).checked_sub(1);
        let unit = &self.units[number.ok_or_else(|| misplaced(id))?];
        let offset = start(unit).map(|start| UnitOffset(id.0 - start));
        let offset = offset.ok_or_else(|| misplaced(id))?;
        let mut tree = unit.entries_tree(Some(offset)).map_err(broken)?;
        let root = tree.root().map_err(broken)?;
        let die = root.entry();
        let tag = die.tag();
        let name = self.name(unit, die).unwrap_or_default();
        let size = udata(die, dw::DW_AT_byte_size);
        let target = self.target(unit, die);
        let encoding = match die.attr_value(dw::DW_AT_encoding) {
            Some(AttributeValue::Encoding(encoding)) => Some(encoding),
            _ => None,
        };
        let mut shape = Shape::default();
        let mut children = root.children();
        while let Some(child) = children.next().map_err(broken)? {
            match child.entry().tag() {
                dw::DW_TAG_member => shape.members.extend(self.member(unit, child.entry())),
                dw::DW_TAG_enumerator => {
                    let value = value(child.entry(), dw::DW_AT_const_value);
                    shape
                        .names
                        .extend(value.zip(self.name(unit, child.entry())));
                }
                dw::DW_TAG_subrange_type => {
                    let upper = udata(child.entry(), dw::DW_AT_upper_bound);
                    shape.count =
                        udata(child.entry(), dw::DW_AT_count).or(upper.map(|upper| upper + 1));
                }
                dw::DW_TAG_variant_part => {
                    let discriminant = child.entry().attr_value(dw::DW_AT_discr);
                    shape.has_variants = true;
                    let mut parts = child.children();
                    while let Some(part) = parts.next().map_err(broken)? {
                        let entry = part.entry();
                        if entry.tag() == dw::DW_TAG_member {
                            let at = AttributeValue::UnitRef(entry.offset());
                            if discriminant == Some(at) {
                                shape.discriminant = self.member(unit, entry);
                            }
                        } else if entry.tag() == dw::DW_TAG_variant {
                            if entry.has_attr(dw::DW_AT_discr_list) {
                                return Err(Error::Image(format!(
                                    "has variants of `{name}` that stand for several values, which \
                                     flukevm cannot read"
                                )));
                            }
                            let value = value(entry, dw::DW_AT_discr_value);
                            let mut fields = part.children();
                            while let Some(field) = fields.next().map_err(broken)? {
                                let member = self.member(unit, field.entry());
                                shape
                                    .variants
                                    .extend(member.map(|member| Variant { value, member }));
                            }
                        }
                    }
                }
                _ => {}
            }
        }
        let kind = match tag {
            dw::DW_TAG_base_type => match encoding {
                Some(dw::DW_ATE_boolean) => Kind::Bool,
                Some(dw::DW_ATE_signed | dw::DW_ATE_signed_char) => Kind::Integer { signed: true },
                Some(dw::DW_ATE_unsigned | dw::DW_ATE_unsigned_char | dw::DW_ATE_UTF) => match size
                {
                    Some(0) => Kind::Struct(Vec::new()),
                    _ => Kind::Integer { signed: false },
                },
                _ => Kind::Other,
            },
            dw::DW_TAG_pointer_type => Kind::Pointer(target),
            dw::DW_TAG_array_type => match (target, shape.count) {
                (Some(element), Some(count)) => Kind::Array { element, count },
                _ => Kind::Other,
            },
            dw::DW_TAG_enumeration_type => Kind::Names(shape.names),
            dw::DW_TAG_structure_type | dw::DW_TAG_union_type if shape.has_variants => {
                Kind::Variants {
                    discriminant: shape.discriminant,
                    variants: shape.variants,
                }
            }
            dw::DW_TAG_structure_type | dw::DW_TAG_union_type => Kind::Struct(shape.members),
            _ => Kind::Other,
        };
        let size = match (&kind, size) {
            (_, Some(size)) => size,
            (Kind::Pointer(_), None) => 8,
            (Kind::Array { element, count }, None) => {
                let element = self.get(*element)?.size;
                element.saturating_mul(*count)
            }
            _ => 0,
        };
        Ok(Type { name, size, kind })
    }

    fn name(&self, unit: &Unit<Slice<'a>>, die: &Die<'a>) -> Option<String> {
        let value = die.attr_value(dw::DW_AT_name)?;
        let text = self.dwarf.attr_string(unit, value).ok()?;
        Some(text.to_string_lossy().into_owned())
    }

    /// The type that an entry refers to.
    fn target(&self, unit: &Unit<Slice<'a>>, die: &Die<'a>) -> Option<TypeId> {
        match die.attr_value(dw::DW_AT_type)? {
            AttributeValue::UnitRef(offset) => id(unit, offset),
            AttributeValue::DebugInfoRef(offset) => Some(TypeId(offset.0)),
            _ => None,
        }
    }

    fn member(&self, unit: &Unit<Slice<'a>>, die: &Die<'a>) -> Option<Member> {
        Some(Member {
            // The discriminant has none.
            name: self.name(unit, die).unwrap_or_default(),
            offset: udata(die, dw::DW_AT_data_member_location)?,
            ty: self.target(unit, die)?,
        })
    }
}

/// What the entries below a type's say.
#[derive(Default)]
struct Shape {
    members: Vec<Member>,
    names: Vec<(u64, String)>,
    count: Option<u64>,
    has_variants: bool,
    discriminant: Option<Member>,
    variants: Vec<Variant>,
}

fn is_type(tag: dw::DwTag) -> bool {
    matches!(
        tag,
        dw::DW_TAG_structure_type
            | dw::DW_TAG_union_type
            | dw::DW_TAG_enumeration_type
            | dw::DW_TAG_base_type
    )
}

fn start(unit: &Unit<Slice<'_>>) -> Option<usize> {
    unit.header.debug_info_offset().map(|offset| offset.0)
}

fn id(unit: &Unit<Slice<'_>>, offset: UnitOffset) -> Option<TypeId> {
    start(unit).map(|start| TypeId(start + offset.0))
}

fn udata(die: &Die<'_>, name: dw::DwAt) -> Option<u64> {
    die.attr(name)?.udata_value()
}

/// A constant as the bits that it is stored in, sign-extended if it has one.
fn value(die: &Die<'_>, name: dw::DwAt) -> Option<u64> {
    let attribute = die.attr(name)?;
    let signed = || attribute.sdata_value().map(|value| value as u64);
    attribute.udata_value().or_else(signed)
}

/// Where a variable lies, if that is one place for good.
fn address(unit: &Unit<Slice<'_>>, die: &Die<'_>) -> Option<u64> {
    let expression = die.attr(dw::DW_AT_location)?.exprloc_value()?;
    match expression.operations(unit.encoding()).next().ok()?? {
        Operation::Address { address } => Some(address),
        _ => None,
    }
}

fn broken(error: addr2line::gimli::Error) -> Error {
    Error::Image(format!("has broken debug information: {error}"))
}

fn misplaced(id: TypeId) -> Error {
    Error::Image(format!(
        "has no type at {:#x} of its debug information",
        id.0
    ))
}

/// The image lacks something that flukevm looks for by name.
pub(super) fn lacks(what: &str) -> Error {
    Error::Image(format!(
        "has no {what}; flukevm reads any layout, but not a kernel with other names"
    ))
}

/// A type's name without the paths in it: `Id<Thread>`.
pub fn short(name: &str) -> String {
    let mut text = String::with_capacity(name.len());
    let mut start = 0;
    let mut rest = name.chars().peekable();
    while let Some(c) = rest.next() {
        if c == ':' && rest.peek() == Some(&':') {
            rest.next();
            text.truncate(start);
        } else {
            text.push(c);
            if !(c.is_alphanumeric() || c == '_') {
                start = text.len();
            }
        }
    }
    text
}
