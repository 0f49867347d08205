/* What the library tells of itself: its sources and the variants it has for this machine. */
#include <stddef.h>

#include "variant.h"

static const struct variant *const VARIANTS[] = {
#if defined(__x86_64__)
    &dmoe_avx512,
    &dmoe_avx2,
#endif
    &dmoe_generic,
};
#define VARIANT_COUNT ((int)(sizeof VARIANTS / sizeof *VARIANTS))

#define TEXT(macro) #macro
#define TEXT_OF(macro) TEXT(macro)

/* Fingerprint of the sources that this was built from. */
DMOE_EXPORT const char *dmoe_sources(void)
{
    return TEXT_OF(DMOE_SOURCES);
}

/* Name of variant `index`, fastest first; null behind the last. */
DMOE_EXPORT const char *dmoe_variant(int index)
{
    return index >= 0 && index < VARIANT_COUNT ? VARIANTS[index]->name : NULL;
}

/* Whether this CPU, and its operating system, can run variant `index`. */
DMOE_EXPORT int dmoe_supported(int index)
{
    return index >= 0 && index < VARIANT_COUNT && VARIANTS[index]->supported();
}

const struct variant *dmoe_variant_at(int index)
{
    return dmoe_supported(index) ? VARIANTS[index] : NULL;
}
