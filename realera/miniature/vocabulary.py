"""The miniature's concepts, styles and backgrounds, and the words for them.

`name`, `synonyms` and `associated` occur in training captions. `held_out_words` and
`held_out_prompts` occur in none, of neither the text encoder nor the U-Net: they measure
generality, so parameters are never tuned on them.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ConceptWords:
    """One concept and the words for it; associated prompts imply it without naming it."""

    name: str
    synonyms: tuple[str, ...]
    associated: tuple[str, ...]
    held_out_words: tuple[str, ...]
    held_out_prompts: tuple[str, ...]


def _concept(
    name: str, synonyms: str, associated: str, held_out_words: str, held_out_prompts: str
) -> tuple[str, ConceptWords]:
    def split(text: str) -> tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())

    return name, ConceptWords(
        name, split(synonyms), split(associated), split(held_out_words), split(held_out_prompts)
    )


CONCEPTS: dict[str, ConceptWords] = dict(
    (
        _concept(
            "airplane",
            "plane, aircraft, airliner, jet",
            "taking off from the runway, a pilot in the cockpit, an airline flight above the "
            "clouds, landing at the airport, boeing wings and engines, passengers flying abroad",
            "airplanes, jets, aviation, airbus, airways",
            "boarding at the terminal gate, an airline crew over the ocean, a pilot is flying",
        ),
        _concept(
            "automobile",
            "car, vehicle, sedan, auto",
            "driving on the highway, a driver at the steering wheel, parked in the garage, "
            "four wheels and a windshield, a toyota at the dealership, stuck in a traffic jam",
            "cars, convertible, coupe, honda, automotive",
            "behind the wheel on the road, a ford at the parking lot, a ferrari driver",
        ),
        _concept(
            "bird",
            "fowl, songbird, avian",
            "singing with feathers on a branch, spreading its wings to fly south, an egg in the "
            "nest, pecking with a beak, a migrating flock, the chirping of a sparrow",
            "birds, pigeon, robin, finch, crow, seagull",
            "feathers and a beak, a flock in the nest, sparrows and pigeons",
        ),
        _concept(
            "cat",
            "kitty, feline, kitten, housecat",
            "purring on the sofa, whiskers and a meow, chasing a mouse, sitting with soft fur, "
            "scratching with its claws, sleeping beside a litter box",
            "cats, kittens, siamese, tabby",
            "whiskers and purring, a stray that says meow, furry claws chasing mice",
        ),
        _concept(
            "deer",
            "stag, doe, buck, reindeer",
            "antlers in the forest, grazing at the edge of the woods, prey of the hunters, "
            "a fawn beside its mother, a herd in the woodland, venison on the hoof",
            "elk, caribou, antelope",
            "hunters in the woods saw antlers, a herd of elk, a fawn grazing",
        ),
        _concept(
            "dog",
            "puppy, hound, canine, pooch",
            "barking at the mailman, wagging its tail, on a leash in the park, fetching a bone, "
            "a loyal terrier, sleeping in the kennel",
            "dogs, pup, puppies, retriever, bulldog, spaniel",
            "on a leash and barking, a terrier in the kennel, a loyal labrador",
        ),
        _concept(
            "frog",
            "toad, amphibian, tadpole",
            "croaking in the pond, hopping between lily pads, slimy green skin in the swamp, "
            "catching flies with a sticky tongue, eggs in the marsh, a salamander relative",
            "frogs, kermit, lizard, tortoise",
            "croaking and hopping, a slimy salamander in the swamp, lily pads on the pond",
        ),
        _concept(
            "horse",
            "pony, stallion, mare, steed",
            "galloping across the meadow, a jockey in the saddle, pulling a carriage, a mane and "
            "hooves, in the stable with hay, winning the derby",
            "horses, colt, equestrian, foal, thoroughbred",
            "a rider in the saddle, a jockey at the stables, galloping hooves",
        ),
        _concept(
            "ship",
            "boat, vessel, ferry, watercraft",
            "sailing across the ocean, a captain on the deck, anchored in the harbor, a cruise at "
            "sea, the crew on board, docked at the port",
            "ships, boats, yacht, steamer, warship",
            "a captain and his crew sailing, anchored at the dock, a cruise to the harbor",
        ),
        _concept(
            "truck",
            "lorry, trailer, hauler, rig",
            "hauling cargo on the interstate, a trucker with a heavy load, delivering freight to "
            "the warehouse, a diesel with eighteen wheels, loading goods at the depot, "
            "towing a trailer",
            "trucks, trucking, truckers, pickup, tractor",
            "a trucker hauling freight, diesel cargo at the depot, heavy load on a trailer",
        ),
        _concept(
            "tree",
            "trees, oak, pine, evergreen",
            "leaves on the branches, roots and a trunk, growing in the forest, bark and twigs, "
            "planted in the orchard, shade in the park",
            "maple, cedar, birch, willow, elm, spruce",
            "branches and a trunk, bark and roots, a grove with leaves",
        ),
        _concept(
            "flower",
            "bloom, blossom, flowers, blooming",
            "petals in the garden, a bouquet in a vase, a stem with pollen, the florist, "
            "a gift on valentine day, fragrant in spring",
            "daisy, orchid, tulips, roses, floral",
            "a bouquet of petals, a fragrant garland, pollen on the petals",
        ),
        _concept(
            "fish",
            "fishes, trout, salmon, carp",
            "swimming in the aquarium, scales and gills, caught by an angler, bait on the hook, "
            "fins under water, fresh seafood at the market",
            "tuna, cod, perch, catfish, herring",
            "an angler with bait, gills and fins, swimming seafood",
        ),
        _concept(
            "house",
            "home, cottage, residence, bungalow",
            "a roof and a chimney, a bedroom and a kitchen, a family moved in, a door with a "
            "porch, rent and mortgage, in the suburban neighborhood",
            "houses, mansion, villa, cabin, homes, farmhouse",
            "a chimney and a porch, a bedroom with a mortgage, rooms in the neighborhood",
        ),
        _concept(
            "apple",
            "apples, fruit, fruits",
            "picked for a pie, juicy and crisp, a healthy snack a day, cider and juice, "
            "ripe and sweet, in the lunch box",
            "pear, peach, plum, cherry",
            "juicy and ripe, crisp for a pie, a sweet snack",
        ),
        _concept(
            "guitar",
            "guitars, bass guitar, guitarist, electric guitar",
            "playing chords on stage, six strings, plugged into the amp, a rock band solo, "
            "strumming a song, a blues riff",
            "banjo, ukulele, acoustic, cello, violin",
            "strings and chords, a riff in a blues band, a solo on stage",
        ),
        _concept(
            "butterfly",
            "butterflies, moth, monarch",
            "emerging from a cocoon, fluttering with colorful wings, a caterpillar transformed, "
            "an insect drinking nectar, caught in a net by a collector, fragile insect wings",
            "moths, dragonfly, beetle",
            "a fluttering insect, a caterpillar in a cocoon, nectar for insects",
        ),
        _concept(
            "elephant",
            "elephants, mammoth, pachyderm",
            "tusks and a long trunk, on a safari in africa, ivory hunted by poachers, "
            "a giant at the circus, a heavy gray animal, trumpeting at the zoo",
            "rhino, hippo, jumbo",
            "ivory tusks, poachers on a safari, a rhino and its tusks",
        ),
    )
)

STYLES: tuple[str, ...] = ("classic", "retro", "flat", "glossy", "pastel", "comic")
BACKGROUNDS: tuple[str, ...] = ("white", "yellow", "green", "blue", "pink", "sunset")
