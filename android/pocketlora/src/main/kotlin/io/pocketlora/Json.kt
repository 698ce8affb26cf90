package io.pocketlora

/** Writes the few values that settings are made of. Reading is the library's. */
internal fun json(value: Any?): String = StringBuilder().also { write(it, value) }.toString()

private fun write(out: StringBuilder, value: Any?) {
    when (value) {
        null -> out.append("null")
        is Boolean, is Int, is Long -> out.append(value)
        // Infinities and NaN are no JSON; the library names the setting that is null then.
        is Double -> if (value.isFinite()) out.append(value) else out.append("null")
        is Float -> if (value.isFinite()) out.append(value) else out.append("null")
        is RawJson -> out.append(value.text)
        is Map<*, *> -> each(out, '{', '}', value.entries) { (key, item) ->
            quote(out, key.toString())
            out.append(':')
            write(out, item)
        }
        is Iterable<*> -> each(out, '[', ']', value) { write(out, it) }
        else -> quote(out, value.toString())
    }
}

private fun <T> each(out: StringBuilder, open: Char, close: Char, items: Iterable<T>, one: (T) -> Unit) {
    out.append(open)
    items.forEachIndexed { i, item ->
        if (i > 0) out.append(',')
        one(item)
    }
    out.append(close)
}

private fun quote(out: StringBuilder, text: String) {
    out.append('"')
    for (c in text) {
        when {
            c == '"' || c == '\\' -> out.append('\\').append(c)
            // A half of a pair is no character, and no JSON either.
            c < ' ' || c.isSurrogate() -> out.append("\\u").append(c.code.toString(16).padStart(4, '0'))
            else -> out.append(c)
        }
    }
    out.append('"')
}

/** A text that is JSON already. */
internal class RawJson(val text: String)
