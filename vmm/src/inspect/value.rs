//! Values in a guest's memory, each with its type: what a field holds, which variant it is, where a
//! pointer leads.

use std::fmt;
use std::rc::Rc;

use fluke_abi::layout::{DIRECT_MAP, KERNEL_IMAGE, KERNEL_STACKS, PAGE_SIZE};

use super::types::{Kind, Layouts, Member, Type, TypeId, lacks, short};
use super::{Error, Result};
use crate::paging::Physical;

/// Where the kernel keeps an object of the type that is its parameter.
const SLOT: &str = "fluke_kernel::arena::Slot";
/// Deepest nesting that [`Value`] shows as text.
const DEPTH_MAX: u32 = 6;
/// Most elements of an array that it shows.
const ELEMENTS_MAX: u64 = 16;
/// From here on numbers are shown in hexadecimal: they are addresses or sets of bits.
const DECIMAL_END: u64 = 4096;

/// The memory of a guest that does not run, and what its kernel's types are.
pub struct Guest<'a> {
    /// Types of the kernel.
    pub types: &'a dyn Layouts,
    /// Physical memory.
    pub memory: &'a dyn Physical,
}

impl Guest<'_> {
    /// Copies memory out from an address of the kernel's.
    ///
    /// # Errors
    /// If not all of it is there.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Result<()> {
        let missing = || Error::Unreadable(address);
        let pa = physical(address).ok_or_else(missing)?;
        self.memory.read(pa, data).map_err(|_| missing())
    }

    /// A static of the kernel.
    ///
    /// # Errors
    /// If the image has none of that path.
    pub fn find_static(&self, path: &str) -> Result<Value<'_>> {
        let found = self.types.find_static(path)?;
        Ok(Value {
            guest: self,
            ty: found.ty,
            address: found.address,
        })
    }
}

/// A value: a type and the virtual address at which one lies.
#[derive(Clone, Copy)]
pub struct Value<'g> {
    guest: &'g Guest<'g>,
    ty: TypeId,
    /// Where it lies.
    pub address: u64,
}

impl<'g> Value<'g> {
    /// What is at an address, taken for a value of a type.
    pub fn new(guest: &'g Guest<'g>, ty: TypeId, address: u64) -> Self {
        Self { guest, ty, address }
    }

    /// Its type.
    ///
    /// # Errors
    /// If the image's description of it is broken.
    pub fn ty(&self) -> Result<Rc<Type>> {
        self.guest.types.get(self.ty)
    }

    fn at(&self, member: &Member) -> Self {
        Self {
            guest: self.guest,
            ty: member.ty,
            address: self.address.wrapping_add(member.offset),
        }
    }

    /// What a type that is nothing but a wrapper wraps: its only field that takes room.
    fn inner(&self) -> Result<Option<Self>> {
        let ty = self.ty()?;
        let Kind::Struct(members) = &ty.kind else {
            return Ok(None);
        };
        let mut found = None;
        for member in members {
            if self.guest.types.get(member.ty)?.size > 0 {
                if found.is_some() {
                    return Ok(None);
                }
                found = Some(self.at(member));
            }
        }
        Ok(found)
    }

    /// The value without the wrappers around it, such as `UnsafeCell` or a structure of one field.
    ///
    /// # Errors
    /// As [`Value::ty`].
    pub fn peeled(&self) -> Result<Self> {
        let mut value = *self;
        while let Some(inner) = value.inner()? {
            value = inner;
        }
        Ok(value)
    }

    /// The value of a type of this name, without the wrappers around it.
    ///
    /// # Errors
    /// If no such value is in the wrappers.
    pub fn unwrapped(&self, name: &str) -> Result<Self> {
        let mut value = *self;
        while short(&value.ty()?.name) != name {
            value = value
                .inner()?
                .ok_or_else(|| self.not(&format!("a `{name}`")))?;
        }
        Ok(value)
    }

    /// A field by name, looked for through wrappers.
    ///
    /// # Errors
    /// If the type has none of that name.
    pub fn field(&self, name: &str) -> Result<Self> {
        let mut value = *self;
        loop {
            let ty = value.ty()?;
            if let Kind::Struct(members) = &ty.kind
                && let Some(member) = members.iter().find(|member| member.name == name)
            {
                return Ok(value.at(member));
            }
            let Some(inner) = value.inner()? else {
                let outer = self.ty()?;
                return Err(lacks(&format!("`{}.{name}`", short(&outer.name))));
            };
            value = inner;
        }
    }

    /// All fields, in the order of the source.
    ///
    /// # Errors
    /// As [`Value::ty`].
    pub fn fields(&self) -> Result<Vec<(String, Self)>> {
        match &self.ty()?.kind {
            Kind::Struct(members) => {
                let field = |member: &Member| (member.name.clone(), self.at(member));
                Ok(members.iter().map(field).collect())
            }
            _ => Ok(Vec::new()),
        }
    }

    /// The variant that an enumeration is: its name, and its fields.
    ///
    /// # Errors
    /// If it is no enumeration, or holds what no variant stands for.
    pub fn variant(&self) -> Result<(String, Self)> {
        let value = self.peeled()?;
        let ty = value.ty()?;
        match &ty.kind {
            Kind::Names(names) => {
                let bits = value.bits(ty.size)?;
                let found = names.iter().find(|(n, _)| mask(*n, ty.size) == bits);
                let (_, name) = found.ok_or_else(|| value.no_variant(&ty, bits))?;
                Ok((name.clone(), value))
            }
            Kind::Variants {
                discriminant,
                variants,
            } => {
                let bits = match discriminant {
                    Some(member) => {
                        let size = value.guest.types.get(member.ty)?.size;
                        Some((value.at(member).bits(size)?, size))
                    }
                    None => None,
                };
                let exact = variants.iter().find(|variant| match (variant.value, bits) {
                    (Some(value), Some((bits, size))) => mask(value, size) == bits,
                    _ => false,
                });
                let default = || variants.iter().find(|variant| variant.value.is_none());
                let (bits, _) = bits.unwrap_or_default();
                let found = exact.or_else(default);
                let variant = found.ok_or_else(|| value.no_variant(&ty, bits))?;
                Ok((variant.member.name.clone(), value.at(&variant.member)))
            }
            _ => Err(value.not("an enumeration")),
        }
    }

    /// An `Option`.
    ///
    /// # Errors
    /// If it is none.
    pub fn option(&self) -> Result<Option<Self>> {
        let (name, content) = self.variant()?;
        match name.as_str() {
            "None" => Ok(None),
            "Some" => content.field("__0").map(Some),
            _ => Err(self.not("an `Option`")),
        }
    }

    /// What a pointer or reference points to.
    ///
    /// # Errors
    /// If it is none.
    pub fn deref(&self) -> Result<Self> {
        let value = self.peeled()?;
        match value.ty()?.kind {
            Kind::Pointer(Some(ty)) => Ok(Self {
                guest: value.guest,
                ty,
                address: value.bits(8)?,
            }),
            _ => Err(value.not("a pointer")),
        }
    }

    /// The value behind this one, if both were elements of an array.
    ///
    /// # Errors
    /// If the type has no size.
    pub fn nth(&self, index: u64) -> Result<Self> {
        let size = self.ty()?.size;
        Ok(Self {
            address: self.address.wrapping_add(size.wrapping_mul(index)),
            ..*self
        })
    }

    /// The elements of an array or a slice: the first, and how many there are.
    ///
    /// # Errors
    /// If it is neither.
    pub fn elements(&self) -> Result<(Self, u64)> {
        let ty = self.ty()?;
        match &ty.kind {
            Kind::Array { element, count } => Ok((
                Self {
                    ty: *element,
                    ..*self
                },
                *count,
            )),
            _ => {
                let first = self.field("data_ptr")?.deref()?;
                Ok((first, self.field("length")?.int()?))
            }
        }
    }

    /// An integer, truth value, pointer or wrapper of one, sign-extended.
    ///
    /// # Errors
    /// If it is something else, or cannot be read.
    pub fn int(&self) -> Result<u64> {
        let value = self.peeled()?;
        let ty = value.ty()?;
        let bits = || value.bits(ty.size);
        match &ty.kind {
            Kind::Integer { signed: true } if (1..8).contains(&ty.size) => {
                let shift = 64 - 8 * ty.size;
                Ok(((bits()? << shift) as i64 >> shift) as u64)
            }
            Kind::Integer { .. } | Kind::Bool | Kind::Pointer(_) | Kind::Names(_) => bits(),
            _ => Err(value.not("a number")),
        }
    }

    /// A truth value.
    ///
    /// # Errors
    /// As [`Value::int`].
    pub fn bool(&self) -> Result<bool> {
        Ok(self.int()? != 0)
    }

    /// The bytes of the value.
    ///
    /// # Errors
    /// If they cannot be read, or are too many for a value.
    pub fn bytes(&self) -> Result<Vec<u8>> {
        let size = self.ty()?.size;
        if size > PAGE_SIZE {
            return Err(self.not("small enough to be read whole"));
        }
        let mut bytes = vec![0; size as usize];
        self.guest.read(self.address, &mut bytes)?;
        Ok(bytes)
    }

    fn bits(&self, size: u64) -> Result<u64> {
        if size > 8 {
            return Err(self.not("a number of 64 bits"));
        }
        let mut bytes = [0; 8];
        self.guest.read(self.address, &mut bytes[..size as usize])?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn not(&self, what: &str) -> Error {
        let name = self.ty().map_or_else(|_| "?".into(), |ty| short(&ty.name));
        Error::Image(format!("has a `{name}` that is not {what}"))
    }

    fn no_variant(&self, ty: &Type, bits: u64) -> Error {
        Error::Corrupt(format!(
            "{bits:#x} at {:#x} is no `{}`",
            self.address,
            short(&ty.name)
        ))
    }

    fn show(&self, f: &mut fmt::Formatter<'_>, depth: u32) -> Result<fmt::Result> {
        let value = *self;
        let ty = value.ty()?;
        if depth > DEPTH_MAX {
            return Ok(f.write_str(".."));
        }
        Ok(match &ty.kind {
            Kind::Integer { signed: true } => write!(f, "{}", value.int()? as i64),
            Kind::Integer { .. } => match value.int()? {
                number @ 0..DECIMAL_END => write!(f, "{number}"),
                number => write!(f, "{number:#x}"),
            },
            Kind::Bool => write!(f, "{}", value.bool()?),
            Kind::Pointer(_) => write!(f, "&{:#x}", value.int()?),
            Kind::Names(_) => f.write_str(&value.variant()?.0),
            Kind::Array { .. } => {
                let (first, count) = value.elements()?;
                let shown = count.min(ELEMENTS_MAX);
                let mut result = f.write_str("[");
                for index in 0..shown {
                    result = result.and(separate(f, index));
                    result = result.and(first.nth(index)?.show(f, depth + 1)?);
                }
                let rest = if shown < count { ", ..]" } else { "]" };
                result.and_then(|()| f.write_str(rest))
            }
            Kind::Struct(_) => {
                let (path, parameter) = ty.name.split_once('<').unwrap_or((&ty.name, ""));
                let name = short(path);
                // Both say where a slot is, in bytes.
                let slot = || {
                    let slot = self.guest.types.find(&format!("{SLOT}<{parameter}"))?;
                    Ok(self.guest.types.get(slot)?.size.max(1))
                };
                match (name.as_str(), value.field("bits"), value.field("marked")) {
                    ("Id", Ok(bits), _) => {
                        let bits = bits.int()?;
                        write!(f, "#{}.{}", u64::from(bits as u32) / slot()?, bits >> 32)
                    }
                    ("Position", _, Ok(marked)) => {
                        write!(f, "#{}", marked.int()?.saturating_sub(1) / slot()?)
                    }
                    _ => f.write_str(&name).and(value.show_fields(f, depth)?),
                }
            }
            Kind::Variants { .. } => {
                let (name, content) = value.variant()?;
                f.write_str(&name).and(content.show_fields(f, depth)?)
            }
            Kind::Other => f.write_str("?"),
        })
    }

    fn show_fields(&self, f: &mut fmt::Formatter<'_>, depth: u32) -> Result<fmt::Result> {
        let mut fields = Vec::new();
        for (name, value) in self.fields()? {
            if value.ty()?.size > 0 {
                fields.push((name, value));
            }
        }
        if fields.is_empty() {
            return Ok(Ok(()));
        }
        let tuple = fields.iter().all(|(name, _)| name.starts_with("__"));
        let (open, close) = if tuple { ("(", ")") } else { (" { ", " }") };
        let mut result = f.write_str(open);
        for (index, (name, value)) in (0..).zip(&fields) {
            result = result.and(separate(f, index));
            if !tuple {
                result = result.and(write!(f, "{name}: "));
            }
            result = result.and(value.show(f, depth + 1)?);
        }
        Ok(result.and_then(|()| f.write_str(close)))
    }
}

/// As Rust's `Debug` would show it.
impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.show(f, 0) {
            Ok(result) => result,
            Err(error) => write!(f, "<{error}>"),
        }
    }
}

fn separate(f: &mut fmt::Formatter<'_>, index: u64) -> fmt::Result {
    match index {
        0 => Ok(()),
        _ => f.write_str(", "),
    }
}

/// Where the kernel's image and its direct map have an address. This much is the host's doing, and no page
/// table is needed for it: a CPU may have one loaded in which the kernel has no place.
pub fn physical(address: u64) -> Option<u64> {
    match address {
        KERNEL_IMAGE.. => Some(address - KERNEL_IMAGE),
        DIRECT_MAP..KERNEL_STACKS => Some(address - DIRECT_MAP),
        _ => None,
    }
}

/// The lower `size` bytes of a number.
fn mask(value: u64, size: u64) -> u64 {
    match size {
        8.. => value,
        _ => value & ((1 << (8 * size)) - 1),
    }
}
