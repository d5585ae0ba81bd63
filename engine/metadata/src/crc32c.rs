//! CRC-32C in the activity log's flavour (`spec/metadata.md` §7.1).

const TABLE: [u32; 256] = {
    let mut table = [0u32; 256];
    let mut n = 0;
    while n < 256 {
        let mut c = n as u32;
        let mut k = 0;
        while k < 8 {
            c = if c & 1 == 1 { (c >> 1) ^ 0x82F6_3B78 } else { c >> 1 };
            k += 1;
        }
        table[n] = c;
        n += 1;
    }
    table
};

/// CRC-32C (Castagnoli, reflected) with initial value `crc` and **no** final inversion; start with 0.
pub fn crc32c_raw(crc: u32, data: &[u8]) -> u32 {
    data.iter().fold(crc, |c, b| TABLE[((c ^ u32::from(*b)) & 0xff) as usize] ^ (c >> 8))
}

#[cfg(test)]
mod tests {
    #[test]
    fn check_value_of_the_specification() {
        assert_eq!(super::crc32c_raw(0, b"123456789"), 0x58e3_fa20);
    }
}
