//! A look at the footer of a foreign Parquet file before the library parses it.
//!
//! The library builds the schema tree by recursion and reserves memory for as many children as an element claims, so a
//! small hostile footer could exhaust the stack or the memory of the process. This walk over the Thrift compact encoding
//! finds the claims first. It follows the `FileMetaData` and `SchemaElement` structures of the Parquet format.

/// Nesting of the schema tree; a window file has 4 levels.
const MAX_DEPTH: usize = 64;

/// Elements of the schema tree; a window file has 33.
const MAX_ELEMENTS: u64 = 100_000;

/// Bytes of a footer; one of 5,000 row groups has 20 MiB.
const MAX_FOOTER_BYTES: usize = 64 << 20;

/// Nesting of Thrift structures other than the schema.
const MAX_SKIP_DEPTH: usize = 32;

/// Why a footer is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FooterError {
    #[error("{0} bytes are too few for a Parquet file")]
    TooShort(usize),
    #[error("the file does not end as a Parquet file")]
    NoMagic,
    #[error("the footer's length of {0} bytes is impossible")]
    Length(usize),
    #[error("the footer is damaged")]
    Damaged,
    #[error(
        "the schema claims more than {MAX_ELEMENTS} elements, more than {MAX_DEPTH} levels, or children that are not there"
    )]
    Schema,
}

/// Checks the footer of a whole file.
///
/// # Errors
/// [`FooterError`] if no reader should touch the file.
pub(super) fn check(file: &[u8]) -> Result<(), FooterError> {
    const MAGIC: &[u8; 4] = b"PAR1";
    const TAIL_BYTES: usize = 8;
    if file.len() < MAGIC.len() + TAIL_BYTES {
        return Err(FooterError::TooShort(file.len()));
    }
    let (body, tail) = file.split_at(file.len() - TAIL_BYTES);
    let (length, magic) = tail.split_first_chunk::<4>().ok_or(FooterError::NoMagic)?;
    if magic != MAGIC {
        return Err(FooterError::NoMagic);
    }
    let length = u32::from_le_bytes(*length) as usize;
    let start = body.len().checked_sub(length).filter(|_| length <= MAX_FOOTER_BYTES);
    let footer = start.and_then(|start| body.get(start..)).ok_or(FooterError::Length(length))?;
    check_file_metadata(&mut Thrift { rest: footer })
}

/// Types of the compact protocol.
mod kind {
    pub(super) const STOP: u8 = 0;
    pub(super) const TRUE: u8 = 1;
    pub(super) const FALSE: u8 = 2;
    pub(super) const BYTE: u8 = 3;
    pub(super) const I16: u8 = 4;
    pub(super) const I32: u8 = 5;
    pub(super) const I64: u8 = 6;
    pub(super) const DOUBLE: u8 = 7;
    pub(super) const BINARY: u8 = 8;
    pub(super) const LIST: u8 = 9;
    pub(super) const SET: u8 = 10;
    pub(super) const MAP: u8 = 11;
    pub(super) const STRUCT: u8 = 12;
    pub(super) const UUID: u8 = 13;
}

struct Thrift<'a> {
    rest: &'a [u8],
}

/// `schema` is field 2 of `FileMetaData`; what follows it is left to the library.
fn check_file_metadata(thrift: &mut Thrift<'_>) -> Result<(), FooterError> {
    const SCHEMA_FIELD: i64 = 2;
    let mut id = 0;
    while let Some((field, field_kind)) = thrift.field(id)? {
        if field == SCHEMA_FIELD && field_kind == kind::LIST {
            return check_schema(thrift);
        }
        thrift.skip(field_kind, MAX_SKIP_DEPTH)?;
        id = field;
    }
    Err(FooterError::Damaged)
}

/// The elements stand in pre-order, each with its number of children.
fn check_schema(thrift: &mut Thrift<'_>) -> Result<(), FooterError> {
    let (count, element_kind) = thrift.list()?;
    if count > MAX_ELEMENTS {
        return Err(FooterError::Schema);
    }
    if element_kind != kind::STRUCT {
        return Err(FooterError::Damaged);
    }
    // Children still to come of each open group, outermost first.
    let mut open: Vec<u64> = Vec::new();
    for index in 0..count {
        if let Some(parent) = open.last_mut() {
            *parent -= 1;
        }
        let children = thrift.schema_element()?;
        if children > count - index - 1 {
            return Err(FooterError::Schema);
        }
        open.push(children);
        if open.len() > MAX_DEPTH {
            return Err(FooterError::Schema);
        }
        while open.last() == Some(&0) {
            open.pop();
        }
    }
    if open.is_empty() { Ok(()) } else { Err(FooterError::Schema) }
}

impl Thrift<'_> {
    /// `num_children` is field 5 of `SchemaElement`; 0 if absent or negative.
    fn schema_element(&mut self) -> Result<u64, FooterError> {
        const CHILDREN_FIELD: i64 = 5;
        let (mut id, mut children) = (0, 0);
        while let Some((field, field_kind)) = self.field(id)? {
            if field == CHILDREN_FIELD && field_kind == kind::I32 {
                children = u64::try_from(self.zigzag()?).unwrap_or(0);
            } else {
                self.skip(field_kind, MAX_SKIP_DEPTH)?;
            }
            id = field;
        }
        Ok(children)
    }

    /// Header of the next field, `None` at the end of the structure.
    fn field(&mut self, last: i64) -> Result<Option<(i64, u8)>, FooterError> {
        let header = self.byte()?;
        let (delta, field_kind) = (header >> 4, header & 0x0F);
        if field_kind == kind::STOP {
            return Ok(None);
        }
        let id = if delta == 0 { self.zigzag()? } else { last.saturating_add(i64::from(delta)) };
        Ok(Some((id, field_kind)))
    }

    fn list(&mut self) -> Result<(u64, u8), FooterError> {
        let header = self.byte()?;
        let count = if header >> 4 == 0x0F { self.varint()? } else { u64::from(header >> 4) };
        Ok((count, header & 0x0F))
    }

    fn skip(&mut self, value_kind: u8, depth: usize) -> Result<(), FooterError> {
        if depth == 0 {
            return Err(FooterError::Damaged);
        }
        match value_kind {
            kind::TRUE | kind::FALSE => Ok(()),
            kind::BYTE => self.advance(1),
            kind::I16 | kind::I32 | kind::I64 => self.varint().map(drop),
            kind::DOUBLE => self.advance(8),
            kind::UUID => self.advance(16),
            kind::BINARY => {
                let length = self.varint()?;
                self.advance(usize::try_from(length).map_err(|_| FooterError::Damaged)?)
            }
            kind::LIST | kind::SET => {
                let (count, element) = self.list()?;
                (0..count).try_for_each(|_| self.skip_element(element, depth - 1))
            }
            kind::MAP => {
                let count = self.varint()?;
                let kinds = if count == 0 { 0 } else { self.byte()? };
                (0..count).try_for_each(|_| {
                    self.skip_element(kinds >> 4, depth - 1)?;
                    self.skip_element(kinds & 0x0F, depth - 1)
                })
            }
            kind::STRUCT => {
                let mut id = 0;
                while let Some((field, field_kind)) = self.field(id)? {
                    self.skip(field_kind, depth - 1)?;
                    id = field;
                }
                Ok(())
            }
            _ => Err(FooterError::Damaged),
        }
    }

    /// Inside a collection a bool takes a byte, so that every element takes one and a count cannot outrun the bytes.
    fn skip_element(&mut self, element: u8, depth: usize) -> Result<(), FooterError> {
        if matches!(element, kind::TRUE | kind::FALSE) { self.advance(1) } else { self.skip(element, depth) }
    }

    fn zigzag(&mut self) -> Result<i64, FooterError> {
        let value = self.varint()?;
        Ok((value >> 1).cast_signed() ^ -((value & 1).cast_signed()))
    }

    fn varint(&mut self) -> Result<u64, FooterError> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(FooterError::Damaged)
    }

    fn byte(&mut self) -> Result<u8, FooterError> {
        let (first, rest) = self.rest.split_first().ok_or(FooterError::Damaged)?;
        self.rest = rest;
        Ok(*first)
    }

    fn advance(&mut self, bytes: usize) -> Result<(), FooterError> {
        self.rest = self.rest.get(bytes..).ok_or(FooterError::Damaged)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file whose footer holds `version` and a schema of elements with these numbers of children.
    fn file(children: &[u8]) -> Vec<u8> {
        let mut footer = vec![0x15, 0x02, 0x19];
        if children.len() < 15 {
            footer.push((u8::try_from(children.len()).unwrap() << 4) | kind::STRUCT);
        } else {
            footer.push(0xF0 | kind::STRUCT);
            let mut count = children.len();
            while count >= 0x80 {
                footer.push(u8::try_from(count & 0x7F).unwrap() | 0x80);
                count >>= 7;
            }
            footer.push(u8::try_from(count).unwrap());
        }
        for children in children {
            // Field 4, a name of one byte; field 5, the children in zigzag.
            footer.extend([0x48, 0x01, b'x', 0x15, children * 2, 0x00]);
        }
        footer.push(0x00);
        let mut file = b"PAR1".to_vec();
        file.extend(&footer);
        file.extend(u32::try_from(footer.len()).unwrap().to_le_bytes());
        file.extend(b"PAR1");
        file
    }

    #[test]
    fn accepts_a_tree_that_adds_up() {
        assert_eq!(check(&file(&[3, 0, 2, 0, 0, 0])), Ok(()));
        assert_eq!(check(&file(&[0])), Ok(()));
    }

    #[test]
    fn refuses_claims_that_do_not_add_up() {
        for children in [&[5, 0][..], &[1, 1], &[2, 0], &[1, 0, 63]] {
            assert_eq!(check(&file(children)), Err(FooterError::Schema), "{children:?}");
        }
    }

    #[test]
    fn refuses_deep_trees() {
        let chain = |depth: usize| {
            let mut children = vec![1_u8; depth];
            children[depth - 1] = 0;
            children
        };
        assert_eq!(check(&file(&chain(MAX_DEPTH))), Ok(()));
        assert_eq!(check(&file(&chain(MAX_DEPTH + 1))), Err(FooterError::Schema));
    }

    #[test]
    fn refuses_what_is_no_parquet_file() {
        assert_eq!(check(b"PAR1PAR1"), Err(FooterError::TooShort(8)));
        assert_eq!(check(b"PAR1\0\0\0\0PAR2"), Err(FooterError::NoMagic));
        assert_eq!(check(b"PAR1\xFF\0\0\0PAR1"), Err(FooterError::Length(255)));
        assert_eq!(check(b"PAR1\0\0\0\0PAR1"), Err(FooterError::Damaged));
    }
}
