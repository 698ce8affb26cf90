package io.pocketlora

import java.io.File
import java.nio.file.Files
import kotlin.test.assertTrue
import kotlin.test.fail

/** A model of two layers that reads bytes, and folders to work in. */
internal object Fixture {
    /** `tests/data/oracles` of the repository, or where a device has it. */
    private val oracles = File(System.getProperty("pocketlora.oracles") ?: "tests/data/oracles")

    fun folder(): File = Files.createTempDirectory("pocketlora").toFile().apply { deleteOnExit() }

    val model: String by lazy {
        val dir = folder()
        for (name in listOf("config.json", "model.safetensors")) File(oracles, "tiny-llama/$name").copyTo(File(dir, name))
        File(dir, "tokenizer.json").writeText(tokenizer())
        val template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" +
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        File(dir, "tokenizer_config.json").writeText(
            json(mapOf("eos_token" to "<|im_end|>", "chat_template" to template)),
        )
        dir.path
    }

    /** Each byte is a token: GPT-2's alphabet, in which printable bytes stand for themselves. */
    private fun tokenizer(): String {
        val printable = (0x21..0x7e) + (0xa1..0xac) + (0xae..0xff)
        var next = 0x100
        val letters = (0..255).associate { byte ->
            (if (byte in printable) byte else next++).toChar().toString() to byte + 3
        }
        fun special(id: Int, text: String) = mapOf(
            "id" to id, "content" to text, "special" to true, "single_word" to false, "lstrip" to false,
            "rstrip" to false, "normalized" to false,
        )
        val bytes = mapOf("type" to "ByteLevel", "add_prefix_space" to false, "trim_offsets" to true, "use_regex" to false)
        val model = mapOf(
            "type" to "BPE", "vocab" to mapOf("<|im_start|>" to 1, "<|im_end|>" to 2) + letters,
            "merges" to emptyList<String>(), "dropout" to null, "unk_token" to null,
            "continuing_subword_prefix" to null, "end_of_word_suffix" to null, "fuse_unk" to false,
            "byte_fallback" to false,
        )
        return json(
            mapOf(
                "version" to "1.0", "truncation" to null, "padding" to null, "normalizer" to null,
                "post_processor" to null,
                "added_tokens" to listOf(special(1, "<|im_start|>"), special(2, "<|im_end|>")),
                "pre_tokenizer" to bytes, "decoder" to bytes, "model" to model,
            ),
        )
    }

    val options = Options(threads = 1, contextTokens = 0, strict = false)

    val examples = (0 until 12).map { Example("what is number $it?", "it is ${it * 7 % 10}") }

    fun training(out: File, steps: Int = 6, start: Start = Start.NEW) = TrainingOptions(
        out.path, examples, start = start, choose = false,
        settings = mapOf("steps" to steps, "lr" to 3e-3, "batch" to 2, "keep" to "off", "check" to false),
    )

    fun bytes(dir: File) = File(dir, "adapter_model.safetensors").readBytes().toList()
}

/** What [work] must throw. */
internal inline fun <reified E : Throwable> throws(says: String = "", work: () -> Unit): E {
    try {
        work()
    } catch (e: Throwable) {
        if (e !is E) throw AssertionError("expected ${E::class.simpleName}, got $e", e)
        assertTrue(says in e.message.orEmpty(), "expected `$says` in `${e.message}`")
        return e
    }
    fail("expected ${E::class.simpleName}, got nothing")
}
